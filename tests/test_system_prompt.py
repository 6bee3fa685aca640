"""The system prompt that all training rows share also opens every question; another one can be given."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from commands_for_tests import qlora
from tokenizers_for_tests import byte_level
from transformers import AutoTokenizer

from qlora.data import Prompts
from qlora.errors import DataError
from qlora.inference.chat import open_chat
from qlora.inference.load import load_trained
from qlora.memory.no_forecast import NoForecastError
from qlora.recipe import Data, Recipe
from qlora.training.train import train

SHARED = "You sort mail.\r\nBe brief."


class Notes:
    """A screen that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def begin(self, speakers: object) -> None: ...
    def text(self, speaker: str, piece: str) -> None: ...
    def end(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def trained(recipe_file: Callable[..., Path], chatml_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that trains one step on rows with these system prompts (None: a row without one)."""

    def run(*systems: str | None) -> Path:
        rows = []
        for number, system in enumerate(systems):
            turns = [("user", f"Question {number}?"), ("assistant", "Yes.")]
            turns = [("system", system), *turns] if system is not None else turns
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
        file = recipe_file(
            base={"model": str(chatml_base)},
            data={"source": str(source), "template": "chatml", "held_out": 1, "max_length": 256},
            training={"max_steps": 1},
        )
        with patch("qlora.memory.run_memory.forecast", side_effect=NoForecastError("not asked for")):
            return train(Recipe.load(file), terminal=False).run

    return run


def asked(folder: Path, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(folder / "adapter").decode(ids))


def test_the_shared_system_prompt_is_stored_and_asked_with(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained(SHARED, SHARED, SHARED)
    found = load_trained(run)
    assert found.system == SHARED
    assert f"system\n{SHARED}<|im_end|>" in asked(run, found.prompts.encode("Hi"))
    assert "system\nOther<|im_end|>" in asked(run, found.prompts.encode("Hi", system="Other"))
    assert "system" not in asked(run, found.prompts.encode("Hi", system=""))

    done = qlora("generate", run, "--prompt", "Hi", "--max-new-tokens", 1)
    assert (
        done.stderr.splitlines()[-1] == "system prompt: You sort mail. Be brief. (that of all training rows)"
    )
    done = qlora("generate", run, "--prompt", "Hi", "--max-new-tokens", 1, "--system", "")
    assert "system prompt" not in done.stderr
    assert "positions" not in done.stderr
    done = qlora("generate", run, "--prompt", "Hi " * 400, "--max-new-tokens", 1)
    assert re.search(r"the prompt has [0-9,]+ tokens, and the model 256 positions; do not rely", done.stderr)

    done = qlora("merge", run, "--to", tmp_path / "merged", "--onto", "dequantized", "--tokens", 0)
    assert f"system prompt in {tmp_path / 'merged' / 'system_prompt.txt'}; a server" in done.stdout
    assert (tmp_path / "merged" / "system_prompt.txt").read_bytes() == SHARED.encode()


@pytest.mark.parametrize(
    "systems", [(SHARED, "Another.", SHARED), (SHARED, None, SHARED), (None, None, None)]
)
def test_rows_that_differ_share_none(trained: Callable[..., Path], systems: tuple[str | None, ...]) -> None:
    run = trained(*systems)
    assert not (run / "adapter" / "system_prompt.txt").exists()
    found = load_trained(run)
    assert found.system is None
    assert "system" not in asked(run, found.prompts.encode("Hi"))
    assert found.prompts.describe_system() == "no system prompt"


def test_chat_shows_sets_clears_and_restores_the_system_prompt(trained: Callable[..., Path]) -> None:
    run, screen = trained(SHARED, SHARED, SHARED), Notes()
    chat = open_chat(str(run), {}, screen, max_new_tokens=1)
    texts = []
    with patch.object(Prompts, "encode", autospec=True, side_effect=Prompts.encode) as encode:
        for line in ("Hi", "/system Rhyme.", "Hi", "/system none", "Hi", "/system trained", "Hi", "/system"):
            chat.say(line)
            if line == "Hi":
                texts.append(encode.call_args.kwargs["system"])
    assert texts == [None, "Rhyme.", "", None]
    own = "system prompt: You sort mail. Be brief. (that of all training rows)"
    assert screen.notes == ["system prompt: Rhyme.", "no system prompt", own, own]


def test_a_system_prompt_that_nothing_writes_is_an_error(tmp_path: Path) -> None:
    raw = Prompts(Data(source="-", format="completion"), byte_level())
    with pytest.raises(DataError, match="format completion or its template writes no system message"):
        raw.encode("Hi", system="Rhyme.")
    drops = tmp_path / "drops.jinja"
    drops.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    dropped = Prompts(Data(source="-", format="messages", template=str(drops)), byte_level())
    with pytest.raises(DataError, match="leave the system message out"):
        dropped.encode("Hi", system="Rhyme.")
    assert dropped.encode("Hi", system="") == dropped.encode("Hi")


def test_options_and_the_fixed_date_of_training_become_the_templates_own() -> None:
    template = (
        "{{ strftime_now('%d %b %Y') }}{{ ' quiet' if quiet else ' loud' }}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    tokenizer = byte_level(chat_template=template)
    prompts = Prompts(Data(source="-", format="messages", template_options={"quiet": True}), tokenizer)
    question = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(question, chat_template=prompts.template, tokenize=False)
    assert text == "26 Jul 2024 quietHi</s>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == prompts.encode("Hi")
    loud = tokenizer.apply_chat_template(
        question, chat_template=prompts.template, tokenize=False, quiet=False
    )
    assert loud == "26 Jul 2024 loudHi</s>"
