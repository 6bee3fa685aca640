"""A result's folder tells other programs how it was asked and where its answers end."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from tokenizers_for_tests import byte_level
from transformers import AutoTokenizer, GenerationConfig

from qlora.data import Prompts, encode_prompt
from qlora.data.prompt_files import write_prompt_files
from qlora.memory.no_forecast import NoForecastError
from qlora.recipe import Data, Recipe
from qlora.training.train import train

CLOSING = "<|im_end|>"
# Writes eos after the questions too, so another eos would change what it writes
WITH_EOS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ eos_token if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Where is the cat?"}]


def settings(file: Path) -> dict[str, object]:
    content = json.loads(file.read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(("method", "name"), [("lora", "adapter"), ("full", "model")])
def test_a_finished_run_is_asked_by_other_programs_as_in_training(
    recipe_file: Callable[..., Path], chatml_base: Path, method: str, name: str
) -> None:
    adapter = {"method": "lora", "rank": 4} if method == "lora" else {"method": "full"}
    file = recipe_file(
        base={"model": str(chatml_base), "quantization": "nf4" if method == "lora" else "none"},
        data={"template": "chatml", "max_length": 256},
        training={"max_steps": 1},
    )
    recipe = json.loads(file.read_text())
    file.write_text(json.dumps({**recipe, "adapter": adapter}))
    with patch("qlora.memory.run_memory.forecast", side_effect=NoForecastError("not asked for")):
        outcome = train(Recipe.load(file), terminal=False)
    folder = outcome.run / name
    theirs = AutoTokenizer.from_pretrained(folder)
    posed = theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    own = AutoTokenizer.from_pretrained(chatml_base)
    assert posed == encode_prompt("Where is the cat?", Recipe.load(file).data, own)
    assert theirs.eos_token == CLOSING
    if method == "full":
        ends = sorted({1, own.eos_token_id, theirs.eos_token_id})  # 1: the base's own
        assert settings(folder / "config.json")["eos_token_id"] == ends
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_a_template_still_writes_the_old_eos_after_another_token_became_eos(tmp_path: Path) -> None:
    tokenizer = byte_level(bos=True, chatml=True, chat_template=WITH_EOS)
    tokenizer.save_pretrained(tmp_path)
    prompts = Prompts(Data(source="-", format="messages"), tokenizer)
    write_prompt_files(tmp_path, prompts)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == CLOSING
    posed = theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert posed == prompts.encode("Where is the cat?")
    assert tokenizer.eos_token_id in posed
    assert not (tmp_path / "generation_config.json").exists()  # an adapter has no config.json


def test_files_that_agree_already_keep_their_bytes(tmp_path: Path) -> None:
    tokenizer = byte_level(chat_template="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    tokenizer.save_pretrained(tmp_path)
    eos = tokenizer.eos_token_id
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": eos}))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_prompt_files(tmp_path, Prompts(Data(source="-", format="messages"), tokenizer))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("model_type", "several"), [("llama", True), ("inkling_text", False), ("bananas", True)]
)
def test_a_config_that_takes_one_end_token_keeps_it(tmp_path: Path, model_type: str, several: bool) -> None:
    pytest.importorskip("transformers.models.inkling")
    tokenizer = byte_level(bos=True, chatml=True, chat_template=WITH_EOS)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 2}))
    write_prompt_files(tmp_path, Prompts(Data(source="-", format="messages"), tokenizer))
    ends = settings(tmp_path / "generation_config.json")["eos_token_id"]
    assert isinstance(ends, list)
    assert 2 in ends
    assert settings(tmp_path / "config.json")["eos_token_id"] == (ends if several else 2)
