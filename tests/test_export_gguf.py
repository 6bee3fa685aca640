"""GGUF files: the tensors of the merge, the logits of transformers and PEFT, and errors that leave no files behind."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_for_tests as llama_cpp
import peft
import pytest
import torch
from adapters_for_tests import write_adapter
from commands_for_tests import qlora
from gguf import GGUFReader
from runs_for_tests import finished_run
from tokenizers_for_tests import byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora.data import Prompts
from qlora.errors import ModelError, SaveError, UsageError
from qlora.export.gguf_adapter import write_adapter as export_adapter
from qlora.export.gguf_model import write_model
from qlora.export.source import model_source
from qlora.merging.merge import merge
from qlora.merging.write import MergeSource, write_merged
from qlora.recipe import Recipe
from qlora.storage.safetensors_files import ShardReader

RecipeFile = Callable[..., Path]

IDS = [3, 17, 200, 5, 99, 41, 7, 7, 300, 12, 64, 2]
SMALL = {
    "vocab_size": 420, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA_3_ROPE, "tie_word_embeddings": True, "head_dim": 32}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen 2": ("qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen 3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma 2": ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma 3": (
        "gemma3_text",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 6,
            "rope_parameters": GEMMA_3_ROPE,
        },
    ),
}


def model_folder(folder: Path, kind: str, seed: int = 0, **settings: Any) -> Path:
    """Write a random model of a family, with norms and biases that are not the initial ones, and a tokenizer."""
    torch.manual_seed(seed)
    known = {
        name: value for name, value in {**SMALL, **settings}.items() if value is not None or name in settings
    }
    if known.get("head_dim", 0) is None:
        del known["head_dim"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**known))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    model.save_pretrained(folder)
    byte_level(bos=True).save_pretrained(folder)
    return folder


def exported(path: Path, to: Path, **settings: Any) -> Path:
    kind = settings.pop("kind", "f32")
    write_model(model_source(path, **settings), to, kind=kind)
    return to


def transformers_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(("kind", "settings"), FAMILIES.values(), ids=FAMILIES)
def test_the_file_has_the_logits_of_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", kind, **settings)
    file = exported(folder, tmp_path / "m.gguf")
    expected = transformers_logits(folder)
    assert expected.std() > 0.1
    torch.testing.assert_close(llama_cpp.logits(file, IDS), expected, rtol=1e-3, atol=1e-3)


def test_only_the_text_model_is_written_of_a_model_that_reads_images(tmp_path: Path) -> None:
    text = {
        **SMALL,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    folder = model_folder(tmp_path / "m", "gemma3", text_config=text, vision_config=vision)
    written = write_model(model_source(folder), tmp_path / "m.gguf", kind="f32")
    assert written.notes == ("Gemma 3: only the text model is written, without the part that reads images",)
    found = llama_cpp.logits(tmp_path / "m.gguf", IDS)
    torch.testing.assert_close(found, transformers_logits(folder), rtol=1e-3, atol=1e-3)


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Recipe:
    return Recipe.load(recipe_file(base={"compute_dtype": "float32"}))


@pytest.mark.parametrize("onto", [None, pytest.param("original", marks=pytest.mark.slow)])
def test_the_tensors_are_those_of_the_merge(recipe: Recipe, tmp_path: Path, onto: str | None) -> None:
    run = finished_run(recipe)
    file = exported(run, tmp_path / "m.gguf", kind="bf16", onto=onto)
    prompts = Prompts(recipe.data, AutoTokenizer.from_pretrained(recipe.base.model))
    write_merged(MergeSource(recipe.base, run / "adapter"), onto or "dequantized", tmp_path / "m", prompts)  # type: ignore[arg-type]
    merged, found = ShardReader(tmp_path / "m"), llama_cpp.tensors(file)
    assert len(found) == len(merged)
    for layer in range(2):
        stem, block = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in {"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}.items():
            assert torch.equal(found[f"{block}{ours}.weight"], merged[f"{stem}{theirs}.weight"].float())
        for name, heads in {"q": 2, "k": 1}.items():
            row = merged[f"{stem}self_attn.{name}_proj.weight"].float().unflatten(0, (heads, -1))
            halves = [row[:, :16], row[:, 16:]]
            stored = found[f"{block}attn_{name}.weight"].unflatten(0, (heads, -1))
            for half, start in zip(halves, (0, 1), strict=True):
                assert torch.equal(stored[:, start::2], half)
    template = llama_cpp.fields(file)["tokenizer.chat_template"]
    assert template == AutoTokenizer.from_pretrained(tmp_path / "m").get_chat_template()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"BF16"}


@pytest.mark.parametrize(
    ("template", "bos", "eos", "eot"),
    [("chatml", False, "<|im_end|>", "</s>"), ("vicuna", True, "</s>", None)],
)
def test_the_file_says_how_the_training_rows_begin_and_end(
    template: str,
    bos: bool,
    eos: str,
    eot: str | None,
    recipe_file: RecipeFile,
    chatml_base: Path,
    tmp_path: Path,
) -> None:
    tokenizer = byte_level(chatml=True)  # which puts no bos in front by itself
    tokenizer.save_pretrained(chatml_base)
    base = {"model": str(chatml_base), "compute_dtype": "float32"}
    run = finished_run(Recipe.load(recipe_file(base=base, data={"template": template})), targets=["q_proj"])
    said = llama_cpp.fields(exported(run, tmp_path / "m.gguf"))
    assert said["tokenizer.ggml.add_bos_token"] is bos
    assert said["tokenizer.ggml.tokens"][said["tokenizer.ggml.eos_token_id"]] == eos
    assert said.get("tokenizer.ggml.eot_token_id") == (eot and tokenizer.convert_tokens_to_ids(eot))


@pytest.mark.slow
def test_a_merged_folder_is_exported_with_the_tensors_of_its_run(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    merge(run, tmp_path / "m", onto="dequantized", max_tokens=0)
    ours, theirs = (exported(path, tmp_path / f"{path.name}.gguf") for path in (run, tmp_path / "m"))
    expected, found = llama_cpp.tensors(ours), llama_cpp.tensors(theirs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    merge(run, tmp_path / "n", onto="nf4", max_tokens=0)
    with pytest.raises(ModelError, match="are quantized, and an export starts from 16 bits"):
        exported(tmp_path / "n", tmp_path / "n.gguf")


def test_a_fully_trained_model_is_exported_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    whole = tmp_path / "full" / "model"
    shutil.copytree(recipe.base.model, whole)
    base = {"model": recipe.base.model, "quantization": "none"}
    data = {"source": recipe.data.source, "format": "messages"}
    (whole / "recipe.yaml").write_text(
        json.dumps({"base": base, "data": data, "adapter": {"method": "full"}})
    )
    file = exported(tmp_path / "full", tmp_path / "full.gguf")
    torch.testing.assert_close(llama_cpp.logits(file, IDS), transformers_logits(whole), rtol=1e-3, atol=1e-3)
    with pytest.raises(UsageError, match=r"--onto original: all weights were trained"):
        model_source(tmp_path / "full", onto="original")


@pytest.mark.parametrize(("kind", "error"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2)])
def test_each_number_format_keeps_the_numbers(kind: str, error: float, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "qwen2", head_dim=None)
    exact = llama_cpp.tensors(exported(folder, tmp_path / "exact.gguf"))
    found = llama_cpp.tensors(exported(folder, tmp_path / "m.gguf", kind=kind))
    for name, tensor in exact.items():
        if tensor.ndim == 1:
            assert torch.equal(found[name], tensor)
        else:
            assert 0 < (found[name] - tensor).norm() / tensor.norm() < error
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert (stored["blk.0.ffn_up.weight"], stored["blk.0.attn_q.bias"]) == (kind.upper(), "F32")


LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_adapter_gives_pefts_logits_as_llama_cpp_applies_it(kind: str, tmp_path: Path) -> None:
    """Alphas and ranks of single layers and rsLoRA's scaling, which llama.cpp does not read, are in the numbers."""
    folder = model_folder(tmp_path / "m", kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shapes = {
        f"model.layers.{i}.{name}": (
            *model.get_submodule(f"model.layers.{i}.{name}").weight.shape,
            2 if "q_proj" in name else 5,
        )
        for i in range(2)
        for name in LINEARS
    }
    write_adapter(
        tmp_path / "a",
        shapes,
        use_rslora=True,
        alpha_pattern={"up_proj": 40},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder),
    )
    base = exported(folder, tmp_path / "m.gguf")
    written = export_adapter(tmp_path / "a", tmp_path / "a.gguf")
    assert written.tensors == 4 * len(LINEARS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bare = model.eval()(torch.tensor([IDS])).logits[0]
        expected = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()(torch.tensor([IDS])).logits[0]
    assert (expected - bare).abs().max() > 0.1
    found = llama_cpp.logits(base, IDS, tmp_path / "a.gguf")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_adapters_that_llama_cpp_cannot_apply_are_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    def refused(said: str, targets: Any = "attention", **changes: Any) -> None:
        recipe = Recipe.load(recipe_file(base={"compute_dtype": "float32"}, adapter=changes))
        run = finished_run(recipe, targets=targets)
        with pytest.raises(ModelError, match=said):
            export_adapter(run, tmp_path / "a.gguf")
        assert not list(tmp_path.glob("*.gguf"))
        shutil.rmtree(run)

    refused("beside the adapter, which llama.cpp does not read", train_modules=["norm"])
    tied = model_folder(tmp_path / "m", "qwen2", head_dim=None, tie_word_embeddings=True)
    write_adapter(tmp_path / "a", {"lm_head": (420, 64, 2)}, base_model_name_or_path=str(tied))
    with pytest.raises(ModelError, match="share their weight"):
        export_adapter(tmp_path / "a", tmp_path / "a.gguf")
    write_adapter(tmp_path / "b", {"model.layers.0.mlp.q": (9, 64, 2)}, base_model_name_or_path=str(tied))
    with pytest.raises(ModelError, match=r"layers.0.mlp.q.weight: llama.cpp has no such tensor in Qwen 2"):
        export_adapter(tmp_path / "b", tmp_path / "b.gguf")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("phi3", {"pad_token_id": 0}, r"Gemma 3, and this model is phi3.*convert_hf_to_gguf\.py"),
        ("llama", {"hidden_act": "gelu"}, "the activation is gelu, not silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by dynamic"),
        ("qwen2", {"rope_parameters": LLAMA_3_ROPE, "head_dim": None}, "is scaled by llama3"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99, not 16"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 16},
         r"layer_types\[0\] is full_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(
    kind: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "m", kind, **settings)
    with pytest.raises(ModelError, match=said):
        exported(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_context_ends_where_a_window_would_begin_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "mistral", sliding_window=40)
    written = write_model(model_source(folder), tmp_path / "m.gguf")
    assert llama_cpp.fields(tmp_path / "m.gguf")["llama.context_length"] == 40
    assert "no sliding window for Mistral: the context ends at 40 tokens" in written.notes[0]


def test_nothing_is_left_after_an_interruption_or_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_source(model_folder(tmp_path / "m", "llama"))
    written: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        written.append(sum(file.stat().st_size for file in (tmp_path / "new" / ".tmp-m.gguf").iterdir()))
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(source, tmp_path / "new" / "m.gguf", progress=interrupt)
    assert written[-1] > written[0] > 1000  # tensor by tensor
    assert not list((tmp_path / "new").iterdir())
    with monkeypatch.context() as full:
        message = "180224 requested and 30768 written"  # numpy's words
        full.setattr("gguf.GGUFWriter.write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError(message)))
        with pytest.raises(SaveError, match=r"m\.gguf: No space left on device \(.* GiB free there\)"):
            write_model(source, tmp_path / "new" / "m.gguf")
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr("qlora.export.gguf_model.free_bytes", lambda path: 9)
    with pytest.raises(SaveError, match=r"m.gguf: it needs 0.00 GiB, and 0.00 GiB are free"):
        write_model(source, tmp_path / "new" / "m.gguf")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.gguf: already exists"):
        write_model(source, tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "mine"


def test_the_command_writes_a_file_and_says_how_to_use_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(recipe)
    monkeypatch.chdir(tmp_path)
    done = qlora("export", run, "--to", "gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert "written  run-q8_0.gguf  (" in done.stdout
    assert "llama-cli -m run-q8_0.gguf" in done.stdout
    done = qlora("export", run / "adapter", "--to", "gguf", "--adapter", "--json")
    assert json.loads(done.stdout)["path"] == "run-adapter-f32.gguf"
    assert llama_cpp.fields(tmp_path / "run-adapter-f32.gguf")["general.type"] == "adapter"
    for wrong, code, said in [
        ([run, "--to", "onnx"], 2, "--to must be one of gguf, ollama, hub, not 'onnx'"),
        ([run, "--to", "gguf", "--type", "q4_k"], 2, "--type must be one of bf16, f16, f32, q8_0"),
        ([run, "--to", "gguf", "--adapter", "--onto", "original"], 2, "--adapter merges nothing"),
        ([run, "--to", "gguf", "--public"], 2, "--public belongs to --to hub"),
        ([run, "--to", "gguf", "--onto", "nf4"], 2, "it has original and dequantized"),
        ([tmp_path / "nothing", "--to", "gguf"], 4, "there is no such folder"),
        ([run, "--to", "gguf", "--type", "q8_0"], 2, "run-q8_0.gguf: already exists"),
    ]:
        done = qlora("export", *wrong)
        assert done.returncode == code, done.stderr
        assert said in " ".join(done.stderr.split()), done.stderr
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    done = qlora("export", run, "--to", "gguf")
    assert (done.returncode, "pip install 'qlora-train[export]'" in done.stderr) == (2, True)
