"""Batched generation: answers equal those of a request alone, whatever else is computed at the same time."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import APART, ARCHITECTURES, LEAKY
from runs_for_tests import finished_run
from serving_for_tests import Gate
from tokenizers_for_tests import byte_level, sentencepiece
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.errors import ModelError, OutOfMemoryError, UsageError
from qlora.inference.generate import answer
from qlora.recipe import Recipe
from qlora.serving import runners
from qlora.serving import start as starting
from qlora.serving.engine import Engine, QueueFull
from qlora.serving.job import Event, Failed, Finished, Job, Piece, Settings, Stopping
from qlora.serving.kv_layout import CannotBatch, read_layout
from qlora.serving.models import Models, open_models
from qlora.serving.runners import Batched, OneAtATime
from qlora.serving.sampling import choose
from qlora.serving.slots import SlotModel
from qlora.serving.start import choose_runner
from qlora.serving.text_stream import TextStream

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
QUESTIONS = ["Hi", "My lamp broke on Friday. I am tired of this.", "There is a hole in the bag", "?"]


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, seed, adapter in (("clerk", 0, {"rank": 4}), ("poet", 5, {"rank": 3, "targets": "attention"})):
        changes = [f"base.model={tiny_llama}", "base.compute_dtype=float32", f"output={place / name}"]
        recipe = Recipe.load("quickstart", changes)
        made[name] = finished_run(recipe, size=1.0, seed=seed, **adapter)
    return made


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> Models:
    return open_models(str(folders["clerk"]), {"poet": str(folders["poet"])}, context=64)


class Answer:
    """Receives the events of a job."""

    def __init__(self) -> None:
        self.text, self.ended = "", threading.Event()
        self.last: Event | None = None

    def tell(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.text += event.text
        else:
            self.last = event
            self.ended.set()


def job_for(models: Models, name: str, question: str, tokens: int, **settings: Any) -> tuple[Job, Answer]:
    model, heard = models.served[name], Answer()
    prompt = settings.pop("prompt", None) or model.prompts.encode(question)
    given = Settings(max_tokens=tokens, ends=models.ends(model), **settings)
    return Job(model.adapter, prompt, given, heard.tell), heard


def answers(engine: Engine, jobs: Sequence[tuple[Job, Answer]]) -> list[str]:
    for job, _ in jobs:
        engine.submit(job)
    for _, heard in jobs:
        assert heard.ended.wait(20)
    return [heard.text for _, heard in jobs]


ASKED = [(name, question) for question in QUESTIONS for name in ("clerk", "poet", "base")]


@pytest.fixture(scope="module")
def alone(models: Models) -> list[str]:
    """Answers to `ASKED`, of 3, 3, 3, 4, ... tokens, each asked alone."""
    found = []
    for number, (name, question) in enumerate(ASKED):
        models.adapters.activate(models.served[name].adapter)  # type: ignore[union-attr]
        ids = models.served[name].prompts.encode(question)
        found.append(answer(models.model, models.tokenizer, ids, 3 + number // 3))
    return found


@pytest.mark.parametrize("batched", [True, False])
def test_answers_of_a_batch_are_those_of_each_request_alone(
    models: Models, alone: list[str], batched: bool
) -> None:
    """Float32, because other dtypes round a batch otherwise; three models, lengths that differ, five slots."""
    runner = choose_runner(models, 5).runner
    if not batched:
        runner = OneAtATime(models.model, models.tokenizer, models.adapters)
    assert isinstance(runner, Batched) == batched
    engine = Engine(runner, models.tokenizer, 20)
    asked = ASKED if batched else ASKED[:4]
    jobs = [job_for(models, *each, 3 + number // 3) for number, each in enumerate(asked)]
    engine.start()
    together = answers(engine, jobs)
    engine.stop()
    engine.join()
    assert together == alone[: len(asked)]
    assert len(set(alone)) > 9
    assert engine.totals.answers == len(asked)
    assert engine.totals.tokens == sum(len(job.tokens) for job, _ in jobs)


def small(name: str, context: int = 64, **changes: Any) -> nn.Module:
    settings = {**ARCHITECTURES, **LEAKY, **APART}[name]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**sizes, **rest, **settings, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt2", {}),
        ("deepseek_v3", {}),
    ],
)
def test_logits_equal_those_without_a_cache(name: str, changes: dict[str, Any]) -> None:
    """Prompts in parts of any length, in slots that are not neighbours, over a slot that another request has used."""
    model = small(name, **changes)
    layout = read_layout(model, 40)
    slots = SlotModel(model, layout, 5, 40)
    slots.check()
    texts = torch.randint(1, 512, (3, 40)).tolist()
    slots.forward([0, 3], [texts[2][:39], texts[2][:39]], [0, 0])  # used before
    slots.forward([0, 3, 4], [texts[0][:3], texts[1][:17], texts[2][:30]], [0, 0, 0])
    slots.forward([0, 4], [texts[0][3:21], texts[2][30:38]], [3, 30])  # padded beyond the end of slot 4
    got = slots.forward([0, 3, 4], [[texts[0][21]], [texts[1][17]], [texts[2][38]]], [21, 17, 38])
    with torch.no_grad():
        expected = [
            model(torch.tensor([text[: end + 1]]), use_cache=False).logits[0, -1]
            for text, end in zip(texts, (21, 17, 38), strict=True)
        ]
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=2e-4)
    assert slots.cache_bytes == 5 * 40 * layout.token_bytes <= layout.bytes(5, 40)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mamba", {}, "takes no positions"),
        ("bloom", {}, "takes no positions"),
        ("lfm2", {}, "LinearAttentionLayer, not keys and values alone"),
        ("gpt_neo", {}, "its window_size of 8 tokens is applied by its own code; --context 8"),
        ("llama4_text", {}, "its attention_chunk_size of 8 tokens"),
        (
            "llama",
            {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
            r"depend on the longest request above 32 tokens; --context 32 allows",
        ),
    ],
)
def test_models_that_cannot_share_a_batch_are_recognised(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CannotBatch, match=reason):
        read_layout(small(name, **changes), 64)


def test_the_check_finds_a_model_whose_batches_are_wrong() -> None:
    model = small("llama")
    layout = read_layout(model, 64)
    SlotModel(model.to(torch.bfloat16), read_layout(model.to(torch.bfloat16), 64), 2, 64).check()
    slots = SlotModel(model.float(), layout, 2, 64)
    # as a model that takes all positions from the first row
    rotate = model.model.rotary_emb.forward

    def without_rows(x: Any, position_ids: torch.Tensor) -> Any:
        return rotate(x, position_ids[:1].expand_as(position_ids))

    model.model.rotary_emb.forward = without_rows
    with pytest.raises(CannotBatch, match="differ from those of a request alone by"):
        slots.check()


def test_one_request_that_fails_ends_alone(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = choose_runner(models, 4).runner
    assert isinstance(runner, Batched)
    forward = runner.model.forward

    def fails(slots: Any, tokens: Sequence[Sequence[int]], starts: Any) -> torch.Tensor:
        if any(7 in row for row in tokens):
            raise RuntimeError("this token\nis broken")
        logits = forward(slots, tokens, starts)
        return logits.masked_fill(torch.tensor([[11 in row] for row in tokens]), float("nan"))

    monkeypatch.setattr(runner.model, "forward", fails)
    engine = Engine(runner, models.tokenizer, 4)
    jobs = [job_for(models, "clerk", "", 5, prompt=prompt) for prompt in ([4, 5, 6], [4, 7], [4, 11], [9, 9])]
    engine.start()
    answers(engine, jobs)
    engine.stop()
    kinds = [type(heard.last) for _, heard in jobs]
    assert kinds == [Finished, Failed, Failed, Finished]
    errors = [heard.last.error for _, heard in jobs if isinstance(heard.last, Failed)]
    assert isinstance(errors[0], RuntimeError)
    assert isinstance(errors[1], ModelError)
    monkeypatch.undo()
    runner.adapters.activate("clerk")  # type: ignore[union-attr]
    assert jobs[3][1].text == answer(models.model, models.tokenizer, [9, 9], 5)


def test_jobs_that_are_left_or_find_no_room(models: Models) -> None:
    """A job that is left has its slot taken by the next one within a round; the queue has a bound."""
    gate = Gate(choose_runner(models, 2).runner)
    gate.open.clear()
    engine = Engine(gate, models.tokenizer, 1)
    jobs = [job_for(models, "clerk", "Hi", 40) for _ in range(3)]
    engine.start()
    for job, _ in jobs:
        engine.submit(job)
    with pytest.raises(QueueFull, match=r"the queue is full \(\d waiting\); try again in \d s") as full:
        engine.submit(job_for(models, "clerk", "Hi", 40)[0])
    assert full.value.retry_after in (2, 3, 4)  # a second for each that waits, before any is known
    jobs[0][0].leave()
    jobs[2][0].leave()
    last = job_for(models, "poet", "Hi", 3)
    engine.submit(last[0])  # in the place of the one that was left
    gate.open.set()
    assert last[1].ended.wait(20)
    assert not jobs[0][0].tokens
    assert not jobs[2][0].tokens
    assert all(jobs[2][0] not in round for round in gate.rounds)
    assert max(map(len, gate.rounds)) == 2
    engine.stop()
    engine.join()
    assert isinstance(jobs[1][1].last, Failed | Finished)
    with pytest.raises(Stopping):
        engine.submit(last[0])


def test_an_engine_that_stops_ends_its_jobs(models: Models) -> None:
    gate = Gate(choose_runner(models, 1).runner)
    gate.open.clear()
    engine = Engine(gate, models.tokenizer, 4)
    jobs = [job_for(models, "clerk", "Hi", 50) for _ in range(3)]
    engine.start()
    for job, _ in jobs:
        engine.submit(job)
    threading.Timer(0.1, gate.open.set).start()
    engine.stop()
    engine.join()
    for job, heard in jobs:
        assert isinstance(heard.last, Failed)
        assert isinstance(heard.last.error, Stopping)
        assert len(job.tokens) <= 1
    assert engine.load == (0, 0)


def test_long_prompts_are_computed_in_parts_of_bounded_size(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "PROMPT_TOKENS", 16)
    runner = choose_runner(models, 4).runner
    assert isinstance(runner, Batched)
    sizes = []
    forward = runner.model.forward

    def sized(slots: Any, tokens: Sequence[Sequence[int]], starts: Any) -> torch.Tensor:
        sizes.append((len(tokens), max(map(len, tokens))))
        return forward(slots, tokens, starts)

    monkeypatch.setattr(runner.model, "forward", sized)
    engine = Engine(runner, models.tokenizer, 4)
    prompts = [list(range(5, 50)), list(range(60, 65)), list(range(70, 77))]
    jobs = [job_for(models, "clerk", "", 4, prompt=prompt) for prompt in prompts]
    engine.start()
    texts = answers(engine, jobs)
    engine.stop()
    assert max(rows * length for rows, length in sizes) == 16
    assert (2, 7) in sizes
    runner.adapters.activate("clerk")  # type: ignore[union-attr]
    assert texts == [answer(models.model, models.tokenizer, prompt, 4) for prompt in prompts]


def test_the_cache_must_fit_into_free_memory(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = read_layout(models.model, models.context)
    assert layout.token_bytes == 2 * 2 * 32 * 4  # layers, keys and values, width of the only head, float32
    monkeypatch.setattr(starting, "free_bytes", lambda _: layout.bytes(3, models.context))
    assert choose_runner(models, 3).cache_bytes == 3 * 64 * layout.token_bytes
    with pytest.raises(OutOfMemoryError, match=r"cache of 4 requests with 64 tokens.*--parallel 3 fits"):
        choose_runner(models, 4)


def test_every_seed_gives_its_own_answer_whatever_else_is_asked(models: Models) -> None:
    engine = Engine(choose_runner(models, 4).runner, models.tokenizer, 20)
    settings = {"temperature": 1.5, "top_p": 0.9}
    engine.start()
    (alone,) = answers(engine, [job_for(models, "clerk", "Hi", 6, seed=3, **settings)])
    jobs = [job_for(models, "clerk", "Hi", 6, seed=seed, **settings) for seed in (1, 2, 3)]
    together = answers(engine, [job_for(models, "poet", "Hi there", 7), *jobs])
    engine.stop()
    assert together[3] == alone
    assert len(set(together)) == 4


def test_choice_of_tokens() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    assert choose(logits, ()) == 1
    assert choose(logits, [1], repetition_penalty=2.0) == 2
    assert choose(-logits, [3, 0], repetition_penalty=4.0) == 3  # 1 / 4 is still more than -1
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        return {choose(logits, (), generator=generator, **settings) for _ in range(200)}

    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_p=0.66) == {1, 2}  # the probabilities are 0.65, 0.24, 0.09, 0.01
    assert drawn(temperature=1.0, top_p=0.0) == drawn(temperature=1e-320) == {1}
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="not finite"):
            choose(torch.tensor([0.0, broken]), ())


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_of_text_add_up_to_the_decoded_answer(make: Callable[[], Any]) -> None:
    tokenizer = make()
    generator = torch.Generator().manual_seed(0)
    texts = [" Grüße, 你好 \U0001f642!  Two  spaces\n\nand lines. ", "   ", "word"]
    samples = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    # single bytes in any order are no text: a decoder can take back a character that was complete
    whole = torch.tensor(
        [token for token in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode(token)]
    )
    samples += [whole[torch.randint(len(whole), (30,), generator=generator)].tolist() for _ in range(20)]
    for tokens in samples:
        stream = TextStream(tokenizer)
        pieces = [*map(stream.feed, tokens), stream.end()]
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    tokens = tokenizer("Once upon a time", add_special_tokens=False).input_ids
    for cut in range(1, len(tokens)):
        continued = TextStream(tokenizer, before=tokens[:cut])
        text = "".join([*map(continued.feed, tokens[cut:]), continued.end()])
        assert tokenizer.decode(tokens[:cut]) + text == tokenizer.decode(tokens)


def test_nothing_of_a_stop_sequence_is_shown() -> None:
    tokenizer = byte_level()
    tokens = tokenizer("one STOX two STOP three", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, stop=["STOP", "never"])
    pieces = []
    for token in tokens:
        pieces.append(stream.feed(token))
        assert "STOP"[:3] not in "".join(pieces)[-3:]
    assert stream.stopped
    assert "".join([*pieces, stream.end()]) == "one STOX two"
    cut = TextStream(tokenizer, stop=["STOP"])
    assert "".join([*map(cut.feed, tokens[:-8]), cut.end()]) == tokenizer.decode(tokens[:-8]).strip()


def test_names_and_lengths_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="--context 300: the model has 256 positions"):
        open_models(str(folders["clerk"]), {}, context=300)
    with pytest.raises(UsageError, match="'base' and 'clerk' are taken"):
        open_models(str(folders["clerk"]), {"base": str(folders["poet"])})
