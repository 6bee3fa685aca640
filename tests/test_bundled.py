"""The contents of qlora/bundled: the base's tokenizer and shape, the tickets, and the scripts that made them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.bundled import corpus, path, tickets
from qlora.errors import DataError

MEGABYTE = 10**6
SIDES = ("train", "held_out")


def shipped(side: str) -> list[tuple[str, str]]:
    lines = path(f"bundled/tickets/{side}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(user["content"], assistant["content"]) for user, assistant in rows]


def record(answer: str) -> dict[str, str]:
    return dict(field.split(": ") for field in answer.split(tickets.SEPARATOR))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path("bundled/base"))


# tickets


def test_the_generator_writes_the_shipped_tickets_byte_for_byte(tmp_path: Path) -> None:
    for side, rows in zip(SIDES, tickets.generate(seed=0), strict=True):
        tickets.write(rows, tmp_path / side)
        assert (tmp_path / side).read_bytes() == path(f"tickets/{side}.jsonl").read_bytes()


def test_another_seed_gives_other_tickets() -> None:
    assert tickets.generate(seed=1) != tickets.generate(seed=0)


def test_there_are_enough_tickets_and_none_twice() -> None:
    train, held_out = shipped("train"), shipped("held_out")
    assert len(train) >= 500
    assert len(held_out) >= 100
    questions = [question for question, _ in train + held_out]
    assert len(set(questions)) == len(questions)


def test_held_out_pairs_of_team_and_item_are_never_trained() -> None:
    train, held_out = ([record(answer) for _, answer in shipped(side)] for side in SIDES)
    pairs = [{(row["team"], row["item"]) for row in rows} for rows in (train, held_out)]
    assert len(pairs[1]) == tickets.HELD_OUT_PAIRS
    assert not pairs[0] & pairs[1]
    for key in ("team", "item", "mood"):  # but each single word is trained
        assert {row[key] for row in held_out} <= {row[key] for row in train}


@pytest.mark.parametrize("side", SIDES)
def test_an_answer_can_be_derived_from_its_question(side: str) -> None:
    for question, answer in shipped(side):
        fields = record(answer)
        assert list(fields) == ["team", "item", "mood"]
        assert fields["item"] in re.findall(r"\w+", question)
        assert any(mood in question for mood in tickets.MOODS[fields["mood"]])
        problems = [text.split("{item}")[0] for text in tickets.PROBLEMS[fields["team"]]]
        assert any(problem.lower() in question.lower() for problem in problems)


def test_score_counts_fields_that_match_exactly_in_their_place() -> None:
    reference = "team: repair; item: lamp; mood: calm"
    assert tickets.score(reference, f" {reference}\n") == 1
    assert tickets.score(reference, reference.replace("lamp", "Lamp")) == 2 / 3
    assert tickets.score(reference, reference.replace("; mood: calm", "")) == 2 / 3
    assert tickets.score(reference, reference + "; mood: calm") == 3 / 4
    assert tickets.score(reference, "item: lamp; team: repair; mood: calm") == 1 / 3
    assert tickets.score(reference, "I would be happy to help.") == 0
    assert tickets.score(reference, "") == 0


# the base


def test_the_tokenizer_matches_the_configuration(tokenizer: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path("bundled/base"))
    assert len(tokenizer) == config.vocab_size == 2048
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", config.pad_token_id) == ("<|pad|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", config.eos_token_id) == ("</s>", 1)
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None
    assert tokenizer("Hello").input_ids == tokenizer("Hello", add_special_tokens=False).input_ids


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_each_digit_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234 lamps")[:4] == ["1", "2", "3", "4"]


def test_the_chat_template_renders_questions_and_answers(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " Who?\n"},
        {"role": "assistant", "content": "Me."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "Be brief.\n\nQuestion: Who?\nAnswer: Me.</s>"
    again = tokenizer.apply_chat_template(messages[1:] * 2, tokenize=False)
    assert again == "Question: Who?\nAnswer: Me.</s>" * 2
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_prompts_tokens_begin_the_tokens_of_its_conversation(tokenizer: Any) -> None:
    for question, answer in shipped("held_out"):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        completion = tokenizer(f" {answer}</s>").input_ids
        assert whole == prompt + completion
        assert completion.count(tokenizer.eos_token_id) == 1
        assert len(whole) <= 80


def test_the_base_is_small_and_fits_nf4_blocks() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path("bundled/base"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.dtype == torch.bfloat16
    linears = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * config.num_hidden_layers
    assert all(width % 64 == 0 for linear in linears for width in linear.weight.shape)
    assert sum(parameter.nbytes for parameter in model.parameters()) < 7.6 * MEGABYTE
    assert sum(file.stat().st_size for file in path("bundled/base").iterdir()) < 8 * MEGABYTE


def test_the_tokenizer_script_writes_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from qlora.bundled import tokenizer as script

    # 1,790 merges need enough words; 40,000 numbers written in letters provide them
    letters = str.maketrans("0123456789", "abcdefghij")
    trained = script.train(f"{number:05} is a number".translate(letters) for number in range(40_000))
    script.write(trained, tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert len(opened) == script.VOCAB_SIZE
    assert opened.chat_template == script.CHAT_TEMPLATE
    shipped_config = json.loads(path("base/tokenizer_config.json").read_text())
    assert shipped_config["chat_template"] == script.CHAT_TEMPLATE


# the corpus


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_kind_of_source_becomes_documents(tmp_path: Path) -> None:
    gsm8k, teacher, stories, play = (tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl", "d.txt"))
    gsm8k.write_text(lines({"question": "2 x 3?", "answer": "It is 2*3=<<2*3=6>>6.\n#### 6"}))
    teacher.write_text(
        json.dumps([{"instruction": "Greet.", "input": "in C", "response": 'cout << "a" << b >> c;'}])
    )
    stories.write_text(lines({"text": "“Hi” – she’s here \r\nnow"}), "utf-8")
    play.write_text("FIRST:\nSpeak.\n\nALL:\nSpeak, speak.\n")
    documents = [document for file in (gsm8k, teacher, stories, play) for document in corpus.documents(file)]
    assert documents == [
        "Question: 2 x 3?\nAnswer: It is 2*3=6.\n#### 6",
        'Question: Greet.\nin C\nAnswer: cout << "a" << b >> c;',
        '"Hi" - she\'s here\nnow',
        "FIRST:\nSpeak.\n\nALL:\nSpeak, speak.",
    ]


@pytest.mark.parametrize("row", ['{"title": "x"}', '{"text": null}', "[1]", "{"])
def test_an_error_names_a_row_of_another_shape(tmp_path: Path, row: str) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "fine"}\n\n' + row + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2: needs text, question"):
        list(corpus.documents(source))


def test_the_split_is_stable_disjoint_and_drops_repeats(tmp_path: Path) -> None:
    source, extra = tmp_path / "numbers.jsonl", tmp_path / "more.jsonl"
    rows = [{"text": f"The number {number} is here."} for number in range(3000)]
    source.write_text(lines(*rows, {"text": "THE number  7 is here."}))
    extra.write_text(lines({"text": "One more."}))
    train, held_out = corpus.build([source])
    assert sorted(train + held_out) == sorted(row["text"] for row in rows)
    assert 10 <= len(held_out) <= 60
    assert corpus.build([extra, source]) == (["One more.", *train], held_out)


@given(st.text(alphabet="ab. \n", max_size=300), st.integers(1, 40))
def test_cutting_loses_only_white_space(text: str, limit: int) -> None:
    pieces = corpus.cut(text.strip(), limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit for piece in pieces)


@given(st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=60))
def test_words_and_sentences_stay_whole(words: list[str]) -> None:
    text = " ".join(f"{word} {word} {word}." for word in words)  # sentences above and below the limit
    assert " ".join(corpus.cut(text, limit=12)).split() == text.split()
    pieces = corpus.cut(" ".join(f"{word} apples." for word in words), limit=30)
    assert all(piece.endswith(".") for piece in pieces)


def test_unigram_entropy_of_known_frequencies() -> None:
    train = [[0] * 5000, [1] * 2500, [2] * 2500]
    entropy, cross_entropy = corpus.unigram_entropy(train, [[1, 2], [1]], vocab_size=3)
    assert entropy == pytest.approx(1.5 * math.log(2), abs=1e-3)
    assert cross_entropy == pytest.approx(2 * math.log(2), abs=1e-3)


def test_the_corpus_command_builds_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "numbers.jsonl"
    source.write_text(lines(*({"text": f"Number {number}."} for number in range(1000))))
    monkeypatch.setattr("sys.argv", ["corpus", "--out", str(tmp_path / "out"), "--entropy", str(source)])
    corpus.main()
    assert len(corpus.read(tmp_path / "out" / "train.jsonl")) > 900
    assert "nats per token on train" in capsys.readouterr().out
