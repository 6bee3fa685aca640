"""GGUF files run by llama.cpp itself (llama-cpp-python): transformers' logits and tokens, PEFT's logits."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapters_for_tests import write_adapter
from gguf_for_tests import fields
from runs_for_tests import finished_run
from test_export_gguf import FAMILIES, IDS, exported, model_folder, transformers_logits
from tokenizers import Regex, pre_tokenizers
from tokenizers_for_tests import byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from qlora import bundled
from qlora.export.gguf_adapter import write_adapter as export_adapter
from qlora.export.gguf_model import write_model
from qlora.export.gguf_tokenizer import SPLITS
from qlora.export.source import model_source
from qlora.recipe import Recipe

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python compiles C++: install qlora-train[llama-cpp]"
)
pytestmark = pytest.mark.slow

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
TEXTS = [
    "Question: My lamp broke on Friday 2024-11-29, it's  naïve — 3.5kg!\n\tAnswer:",
    "We'll PAY 1234567 for\r\n\r\n  it; ДОМ, 東京タワー, עברית, नमस्ते, 🦙🦙 and é!",
    " leading, trailing  \n\n\n   ",
    "x" * 40 + "=" * 9 + "   " * 5 + "end",
    "HTTPServer.getURL(self, *args) -> None:  # don't",
]


@contextmanager
def running(file: Path, **settings: Any) -> Iterator[Any]:
    """Run a file with exact arithmetic: one thread, the cache in float32."""
    model = llama_cpp.Llama(
        str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, **settings
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def logits(file: Path, **settings: Any) -> Tensor:
    with running(file, **settings) as model:
        model.eval(IDS)
        return torch.tensor(np.array(model.scores[: len(IDS)]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*FAMILIES.values(), ("qwen3", {"rope_parameters": YARN, "head_dim": 32})],
    ids=[*FAMILIES, "yarn"],
)
def test_llama_cpp_computes_the_logits_of_transformers(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "m", kind, **settings)
    file = exported(folder, tmp_path / "m.gguf")
    expected = transformers_logits(folder)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(file), expected, rtol=2e-3, atol=2e-3 * expected.std().item())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_cpp_applies_the_adapter_as_peft_does(kind: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    shapes = {name: (*model.get_submodule(name).weight.shape, 2 + 3 * ("q" in name)) for name in names}
    config = {"use_rslora": True, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder)}
    write_adapter(tmp_path / "a", shapes, alpha_pattern={"down_proj": 40}, **config)
    export_adapter(tmp_path / "a", tmp_path / "a.gguf")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bare = model.eval()(torch.tensor([IDS])).logits[0]
        expected = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()(torch.tensor([IDS])).logits[0]
    assert (expected - bare).abs().max() > 0.1
    found = logits(exported(folder, tmp_path / "m.gguf"), lora_path=str(tmp_path / "a.gguf"))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.std().item())


def llama_3() -> Tokenizer:
    import llama_models

    (steps, _), *_ = [key for key, name in SPLITS.items() if name == "llama-bpe"]
    file = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"
    control = ["<|begin_of_text|>", "<|end_of_text|>"]
    made = TikTokenConverter(str(file), pattern=steps[0][1], extra_special_tokens=control).converted()
    made.model.ignore_merges = True
    return Tokenizer(tokenizer_object=made, bos_token=control[0], eos_token=control[1])


def mistral() -> Tokenizer:
    import mistral_common

    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    folder = Path(os.environ["QLORA_CACHE"]) / "mistral"
    folder.mkdir(exist_ok=True)
    shutil.copy(file, folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder)


def split_by(name: str) -> Tokenizer:
    """Return a small byte-level tokenizer that splits texts in one of the ways that llama.cpp knows."""
    (steps, whole_words), *_ = [key for key, known in SPLITS.items() if known == name]
    made = byte_level()
    makers: dict[str, Callable[[Any], Any]] = {
        "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "ByteLevel": lambda words: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words),
    }
    inner = made.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Sequence([makers[kind](value) for kind, value in steps])
    inner.model.ignore_merges = whole_words
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bundled": lambda: AutoTokenizer.from_pretrained(bundled.path("bundled/base")),
    "gpt-2": lambda: byte_level(bos=True, chatml=True),
    "llama 3": llama_3,
    "mistral": mistral,
    **{f"split {name}": partial(split_by, name) for name in SPLITS.values()},
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_llama_cpp_splits_texts_into_the_same_tokens(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    small = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    folder = model_folder(
        tmp_path / "m",
        "llama",
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        num_key_value_heads=1,
        **small,
    )
    tokenizer.save_pretrained(folder)
    file = exported(folder, tmp_path / "m.gguf", kind="f16")
    with running(file) as model:
        for text in TEXTS:
            if tokenizer.vocab_size == 32000:
                text = text.lstrip()  # llama.cpp doubles a space at the beginning, transformers does not
            assert model.tokenize(text.encode(), add_bos=True) == tokenizer.encode(text), text
            ids = tokenizer.encode(text, add_special_tokens=False)
            plain = model.detokenize(ids).decode()
            assert plain.strip() == text.strip()


@pytest.mark.parametrize("template", ["mistral-v1", "llama-2", "vicuna", "plain", "zephyr"])
@pytest.mark.parametrize("made", ["mistral", "gpt-2"])
def test_llama_cpp_reads_a_prompt_as_the_training_rows(
    made: str, template: str, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[made]()
    folder = model_folder(tmp_path / "m", "llama", vocab_size=len(tokenizer), hidden_size=64)
    tokenizer.save_pretrained(folder)
    data = {"template": template, "control_tokens": "text"} if made == "gpt-2" else {"template": template}
    recipe = Recipe.load(recipe_file(base={"model": str(folder), "compute_dtype": "float32"}, data=data))
    source = model_source(finished_run(recipe))
    write_model(source, tmp_path / "m.gguf", kind="f16")
    assert source.prompts is not None
    messages = [{"role": "user", "content": "My lamp broke."}]
    template_in_file = fields(tmp_path / "m.gguf")["tokenizer.chat_template"]
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=template_in_file, tokenize=False, add_generation_prompt=True
    )
    with running(tmp_path / "m.gguf") as model:
        ids = model.tokenize(rendered.encode(), add_bos=False, special=True)
    expected = source.prompts.encode("My lamp broke.")
    if (made, template) == ("mistral", "zephyr"):  # a control token in the middle
        assert ids != expected
        assert source.notes[0].startswith("llama.cpp reads a space before the text after each control token")
    else:
        assert (ids, source.notes) == (expected, ())
