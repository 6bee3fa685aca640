"""A chat: models answer in turn, messages are remembered, and no input line ends the program by mistake."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from runs_for_tests import finished_run
from tokenizers_for_tests import byte_level, sentencepiece
from typer.testing import CliRunner

from qlora import cli
from qlora.cli.chat import Plain, Terminal
from qlora.data import Prompts
from qlora.errors import DataError, ModelError, UsageError
from qlora.inference.chat import Chat, open_chat
from qlora.inference.generate import answer
from qlora.inference.load import load_trained
from qlora.recipe import Data, Recipe
from qlora.runtime.streams import unbreakable_output

RecipeFile = Callable[..., Path]


class Heard:
    """A screen that records its calls."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.pieces = 0
        self.on_piece: Callable[[], object] = lambda: None

    def begin(self, speakers: Sequence[str]) -> None:
        self.expected = list(speakers)

    def text(self, speaker: str, piece: str) -> None:
        assert speaker in self.expected
        if self.answers and self.answers[-1][0] == speaker and self.pieces:
            self.answers[-1] = speaker, self.answers[-1][1] + piece
        else:
            self.answers.append((speaker, piece))
        self.pieces += 1
        self.on_piece()

    def end(self) -> None:
        self.pieces = 0

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def runs(recipe_file: RecipeFile, tmp_path: Path) -> dict[str, Path]:
    recipe = Recipe.load(recipe_file(base={"compute_dtype": "float32"}, output=str(tmp_path / "clerk")))
    poet = recipe.model_copy(update={"output": str(tmp_path / "poet")})
    return {
        "clerk": finished_run(recipe, size=1.0),
        "poet": finished_run(poet, size=1.0, seed=5, targets="attention", rank=3),
    }


def chat_of(runs: dict[str, Path], **settings: Any) -> tuple[Chat, Heard]:
    heard = Heard()
    others = {"poet": str(runs["poet"])}
    return open_chat(str(runs["clerk"]), others, heard, **{"max_new_tokens": 6, **settings}), heard


def test_base_and_adapters_answer_as_they_do_alone(runs: dict[str, Path]) -> None:
    chat, heard = chat_of(runs)
    for line in [
        "Hi",
        "/adapter poet",
        "Hi",
        "/base",
        "Hi",
        "/adapter clerk",
        "/both",
        "Hi",
        "/adapter poet",
        "Hi",
    ]:
        chat.say(line)
    clerk, poet = load_trained(runs["clerk"]), load_trained(runs["poet"])
    bare = load_trained(runs["clerk"], with_adapter=False)
    ids = chat.prompts.encode("Hi")
    alone = {
        name: answer(model.model, model.tokenizer, ids, 6)
        for name, model in {"clerk": clerk, "poet": poet, "base": bare}.items()
    }
    speakers = ["clerk", "poet", "base", "base", "clerk", "poet"]
    assert heard.answers == [(speaker, alone[speaker]) for speaker in speakers]
    assert len(set(alone.values())) == 3
    assert heard.notes[2:4] == ["answering: clerk", "answering: base and clerk"]


def test_a_conversation_is_remembered_if_rows_are_conversations(runs: dict[str, Path]) -> None:
    chat, heard = chat_of(runs, history=True)
    chat.say("First question")
    said = heard.answers[0][1]
    assert chat.messages == [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": said},
    ]
    posed: list[list[int]] = []
    encode = chat.prompts.encode
    chat.prompts.encode = lambda *a, **k: posed.append(encode(*a, **k)) or posed[-1]  # type: ignore
    chat.say("Second question")
    assert chat.tokenizer.decode(posed[0]) == (
        f"Question: First question\nAnswer: {said}</s>Question: Second question\nAnswer:"
    )
    chat.say("/reset")
    assert chat.messages == []
    chat.say("/both")
    chat.say("Third question")
    # of the two answers, the adapter's is the one that is remembered
    assert heard.answers[-2][1] != heard.answers[-1][1] == chat.messages[-1]["content"]
    single, _ = chat_of(runs)  # the rows of the bundled tickets are single questions
    single.say("First question")
    assert single.messages == []


def test_messages_that_no_longer_fit_are_forgotten(runs: dict[str, Path]) -> None:
    chat, heard = chat_of(runs, history=True, max_new_tokens=4)
    chat.say("word " * 120)
    chat.say("Second")
    assert len(chat.messages) == 4
    chat.say("word " * 120)  # the model has 256 positions
    assert len(chat.messages) == 2 + 2
    assert heard.notes == ["(the conversation is too long; its oldest questions were dropped: 1)"]
    chat.say("word " * 300)
    assert "the model has 256 positions" in heard.notes[-1]


def test_mistakes_are_reported_as_notes(runs: dict[str, Path]) -> None:
    chat, heard = chat_of(runs)
    for line, note in {
        "/nonsense": "there is no command /nonsense; /help lists the commands",
        "/adapter none": "no adapter is named 'none'; loaded: clerk, poet",
        "/base now": "/base takes no argument",
        "a\0b": "NUL character: in the prompt; remove it",
        "/adapter": "adapters: clerk, poet; answering: clerk",
    }.items():
        assert chat.say(line) is None
        assert heard.notes[-1] == note
    chat.say("/help")
    assert all(f"/{name}" in heard.notes[-1] for name in [*chat.commands, "quit"])
    chat.say("   ")
    assert not heard.answers


def test_ctrl_c_stops_the_answer_and_not_the_program(runs: dict[str, Path]) -> None:
    chat, heard = chat_of(runs, history=True, max_new_tokens=60)
    chat.say("Hi")
    whole = heard.answers.pop()[1]
    chat.say("/reset")
    heard.on_piece = lambda: signal.raise_signal(signal.SIGINT) if heard.pieces == 2 else None
    assert chat.say("Hi") == signal.SIGINT
    stopped = heard.answers[-1][1]
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    assert chat.messages[-1]["content"] == stopped
    heard.on_piece = lambda: signal.raise_signal(signal.SIGINT)  # one Ctrl-C for every piece
    chat.say("/both")
    assert chat.say("Hi again") == signal.SIGINT
    assert chat.adapters.active == "clerk"
    assert chat.messages[-1]["content"] == stopped  # an answer that was never given is not remembered
    heard.on_piece = lambda: None
    assert chat.say("And on?") is None


def test_the_pieces_add_up_to_the_answer(runs: dict[str, Path]) -> None:
    trained = load_trained(runs["clerk"])
    pieces: list[str] = []
    ids = Prompts(trained.recipe.data, trained.tokenizer).encode("Hi")
    whole = answer(trained.model, trained.tokenizer, ids, 40, on_text=pieces.append)
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    first = trained.tokenizer(whole).input_ids[0]
    assert answer(trained.model, trained.tokenizer, ids, 40, stop_ids={first, *range(2048)}).count(" ") == 0
    warm = {answer(trained.model, trained.tokenizer, ids, 8, temperature=3.0) for _ in range(3)}
    assert len(warm) == 3


def test_a_model_that_cannot_generate_is_an_error_that_names_it(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As xLSTM with an odd size of heads, which trains all the same."""
    trained = load_trained(next(iter(runs.values())))

    def broken(**_: object) -> None:
        raise ValueError("matC_old has wrong shape")

    monkeypatch.setattr(trained.model, "generate", broken)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM fails when it generates \(ValueError: matC_old .*samples=0"
    ):
        answer(trained.model, trained.tokenizer, [3, 4], 8)


def test_in_a_pipe(runs: dict[str, Path], tmp_path: Path) -> None:
    lines = "Hi\n/both\nHi\n/adapter missing\n/quit\nnever asked\n"
    arguments = [
        "chat",
        str(runs["clerk"]),
        "--adapter",
        f"poet={runs['poet'] / 'adapter'}",
        "--max-new-tokens",
        "6",
    ]
    result = CliRunner().invoke(cli.app, arguments, input=lines, catch_exceptions=False)
    assert result.exit_code == 0
    chat, heard = chat_of(runs)
    for line in ["Hi", "/both", "Hi"]:
        chat.say(line)
    (_, alone), (_, base), (_, again) = heard.answers
    assert result.stdout == f"{alone}\nbase: {base}\nclerk: {again}\n"
    assert "no adapter is named 'missing'" in result.stderr
    end = CliRunner().invoke(cli.app, arguments, input="", catch_exceptions=False)
    assert (end.exit_code, end.stdout) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_an_answer_sets_the_exit_code(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(Chat, "say", lambda self, line: number)
    result = CliRunner().invoke(cli.app, ["chat", str(runs["clerk"])], input="Hi\nnever asked\n")
    assert result.exit_code == code


def test_adapters_that_cannot_be_opened_are_refused(
    runs: dict[str, Path], recipe_file: RecipeFile, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="nowhere: no adapter here"):
        open_chat(str(runs["clerk"]), {"a": str(tmp_path / "nowhere")}, Heard())
    with pytest.raises(UsageError, match="'base' and 'clerk' are taken"):
        open_chat(str(runs["clerk"]), {"clerk": str(runs["poet"])}, Heard())
    result = CliRunner().invoke(cli.app, ["chat", str(runs["clerk"]), "--adapter", "poet"])
    assert result.exit_code == 2
    assert "NAME=FOLDER" in result.output


def test_adapters_of_another_base_answer_only_if_forced(runs: dict[str, Path]) -> None:
    file = runs["poet"] / "adapter" / "qlora.json"
    record = json.loads(file.read_text())
    own = {"tokenizer": "0" * 32, "template": "0" * 32}  # all adapters get the prompts of the first adapter
    file.write_text(json.dumps({**record, "base": {**record["base"], **own}}))
    assert chat_of(runs)[0].adapters.names == ["clerk", "poet"]
    file.write_text(json.dumps({**record, "base": {**record["base"], "weights": "0" * 32}}))
    with pytest.raises(ModelError, match=r"poet/adapter: the adapter was trained on .* differ in weights"):
        chat_of(runs)
    assert chat_of(runs, any_base=True)[0].adapters.names == ["clerk", "poet"]
    (runs["clerk"] / "adapter" / "qlora.json").write_text(
        json.dumps({**record, "base": {**record["base"], **own}})
    )
    arguments = ["chat", str(runs["clerk"])]
    assert isinstance(CliRunner().invoke(cli.app, arguments, input="").exception, ModelError)
    assert CliRunner().invoke(cli.app, [*arguments, "--any-base"], input="").exit_code == 0


def test_the_terminal_shows_two_answers_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with unbreakable_output():
        screen = Terminal()
        screen.begin(["base", "clerk"])
        screen.text("base", "one\x1b[2Jtwo")
        screen.text("clerk", "three")
        screen.end()
        screen.begin(["clerk"])
        screen.text("clerk", "plain\x07")
        screen.end()
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["base", "clerk"] in rows
    assert rows[-1] == ["one\ufffd[2Jtwo", "three", "plain\ufffd"]  # (a terminal has a line break here)
    Plain().note("to the side")
    assert capsys.readouterr().err == "to the side\n"


def test_prompts_record_the_end_of_answers_and_if_questions_follow(tmp_path: Path) -> None:
    chatml = byte_level(chatml=True)
    conversations = Data(source="-", format="messages", template="chatml")
    prompts = Prompts(conversations, chatml)
    eos, closing = chatml.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert prompts.stop_ids == {eos, closing}
    assert prompts.accepts_history
    alpaca = Prompts(Data(source="-", format="alpaca"), sentencepiece())
    assert alpaca.stop_ids == {sentencepiece().eos_token_id}
    assert not alpaca.accepts_history
    assert not Prompts(Data(source="-", format="completion"), chatml).accepts_history
    before = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    assert chatml.decode(prompts.encode("C?", before)) == (
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
        "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
    )
    single = tmp_path / "single.jinja"
    single.write_text(
        "{% if messages | length > 2 %}{{ raise_exception('one at a time') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    once = Prompts(Data(source="-", format="messages", template=str(single)), chatml)
    assert not once.accepts_history
    with pytest.raises(DataError, match="refused by the chat template: one at a time"):
        once.encode("C?", before)


@pytest.mark.parametrize(("turns", "expected"), [(1, False), (2, True)])
def test_rows_show_if_questions_follow(tmp_path: Path, turns: int, expected: bool) -> None:
    import json

    turn = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    rows = [{"messages": turn}, {"broken": 1}, {"messages": turn * turns}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = Data(source=str(file), format="messages", template="chatml")
    assert Prompts(data, byte_level(chatml=True)).trained_on_history is expected
    elsewhere = data.model_copy(update={"source": "someone/rows"})
    assert Prompts(elsewhere, byte_level(chatml=True)).trained_on_history
