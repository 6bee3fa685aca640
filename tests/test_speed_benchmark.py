"""The speed benchmark: its contenders train alike, one that does not is detected, and its numbers are right."""

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_kernels
from benchmarks.speed import fairness, flops, paths, profile, ratios, report, workload
from benchmarks.speed.contenders import Contender, chosen, field, peft_loop, peft_tuned
from benchmarks.speed.contenders import qlora as ours
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter
from benchmarks.speed.prepare import Prepared, Setting, prepare
from benchmarks.speed.presets import PRESETS, Shape
from benchmarks.speed.rounds import Comparison, Runner
from qlora.kernels import triton_kernels
from qlora.model.load import load_base
from qlora.recipe import Base

peft = pytest.importorskip("peft")
# PEFT 0.21 reads a transformers 4 attribute, which transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WARMUP = 1


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    cache = tmp_path_factory.mktemp("speed")
    return Setting(PRESETS["tiny"], steps=3, dtype="float32", device="cpu", cache=str(cache))


@pytest.fixture(scope="module")
def prepared(setting: Setting) -> Prepared:
    return prepare(setting)


@pytest.fixture(scope="module")
def job(setting: Setting, prepared: Prepared) -> Job:
    return prepared.job(setting, warmup=WARMUP, lr=2e-3)


@pytest.fixture(scope="module")
def answers(job: Job) -> dict[str, Answer]:
    """Return the answers of the real contenders, and of one whose optimizer does nothing."""
    checkpointed, idle = dataclasses.replace(job, flags=("ckpt",)), dataclasses.replace(job, lr=0.0)
    return {
        "qlora": ours.train(job, Meter(job)),
        "qlora +ckpt": ours.train(checkpointed, Meter(checkpointed)),
        "peft_tuned": peft_tuned.train(job, Meter(job)),
        "peft_tuned +ckpt": peft_tuned.train(checkpointed, Meter(checkpointed)),
        "idle": ours.train(idle, Meter(idle)),
    }


def alone(answers: dict[str, Answer]) -> dict[str, list[Answer]]:
    """Return one round of the contenders that train."""
    return {name: [answer] for name, answer in answers.items() if name != "idle"}


def test_the_checkpoint_equals_one_made_by_transformers(job: Job) -> None:
    """Peers dequantize to the dtype in the quant state; a dtype other than the products' would slow them down."""
    model = peft_loop.load(job)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(linear) is Linear4bit
    assert linear.weight.quant_state.dtype == torch.float32
    assert linear.weight.quant_state.nested
    assert linear.compute_dtype == torch.float32
    ids = torch.arange(16)[None]
    mine = load_base(Base(model=job.base, compute_dtype="float32"))
    torch.testing.assert_close(model.train()(input_ids=ids).logits, mine(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_survive_the_checkpoint(setting: Setting, tmp_path: Path, tied: bool) -> None:
    config = setting.preset.config | {"tie_word_embeddings": tied}
    made = prepare(
        dataclasses.replace(setting, preset=setting.preset.change(config=config), cache=str(tmp_path))
    )
    model = load_base(Base(model=made.base, compute_dtype="float32"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


def test_contenders_compute_the_same_losses_gradients_and_updates(answers: dict[str, Answer]) -> None:
    assert fairness.problems(alone(answers), "float32") == {}
    mine, theirs = answers["qlora"], answers["peft_tuned"]
    assert len(mine.losses) == len(mine.grad_norms) == len(mine.seconds) == 3
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert mine.grad_norms == pytest.approx(theirs.grad_norms, rel=5e-3)
    assert mine.losses[-1] < mine.losses[0]
    assert mine.positions == theirs.positions == 3 * 64


def test_a_contender_that_does_not_train_is_detected(answers: dict[str, Answer]) -> None:
    given = {name: [answer] for name, answer in answers.items()}
    assert fairness.problems(given, "float32").keys() == {"idle"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"losses": [5.0, 5.0, 4.9]}, "loss of step 1"),
        ({"losses": [math.nan] * 3}, "loss of step 1 is nan"),
        ({"grad_norms": [0.0] * 3}, "gradient norm of step 1 is 0"),
        ({"adapter_change": 0.0}, "moved A and B by 0"),
        ({"losses": [], "grad_norms": []}, "took 0 steps"),
        ({"error": "ImportError: no"}, "ImportError"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_not_training_is_named(
    answers: dict[str, Answer], change: dict[str, object], words: str, dtype: str
) -> None:
    given = alone(answers)
    given["lazy"] = [given["qlora"][0], dataclasses.replace(given["qlora"][0], **change)]
    found = fairness.problems(given, dtype)
    assert found.keys() == {"lazy"}
    assert words in found["lazy"]


def test_a_loss_that_does_not_fall_counts_as_not_training(answers: dict[str, Answer]) -> None:
    flat = [dataclasses.replace(answers["qlora"], losses=[5.5, 5.5, 5.5])]
    assert "learned nothing" in fairness.problems({"a": flat, "b": flat, "c": flat}, "float32")["a"]


def test_ratios_are_computed_from_paired_rounds(setting: Setting, prepared: Prepared) -> None:
    def answer(seconds: list[float], peak: int) -> Answer:
        memory = {"imports": 100, "load": 150, "warmup": peak + 50, "train": peak}
        return Answer([5.0, 5.0, 4.9], [1.0] * 3, seconds, 384, 1.0, memory=memory)

    comparison = Comparison(
        setting,
        dataclasses.replace(prepared, tokens=[100, 100, 200], supervised=[50, 50, 100]),
        [Contender("qlora"), Contender("peft_tuned"), Contender("broken")],
        WARMUP,
        {
            "qlora": [answer([9.0, 1.0, 4.0], 300), answer([9.0, 2.0, 8.0], 300)],
            "peft_tuned": [answer([9.0, 2.0, 8.0], 500), answer([9.0, 8.0, 32.0], 700)],
            "broken": [Answer(error="OutOfMemoryError: no")],
        },
        product_rates=[1e9, 1e9],
    )
    mine, theirs = ratios.scores(comparison)
    assert mine.rates == [75.0, 37.5]  # without the warm-up
    assert theirs.rates == [37.5, 9.375]
    assert mine.supervised == pytest.approx(56.25 / 2)
    assert mine.seconds == ratios.Spread(1.0, 3.0, 8.0)
    assert mine.memory == [200, 200]
    assert mine.highest_memory == 250
    (ratio,) = ratios.ratios([mine, theirs])
    assert ratio.speed == ratios.Spread(2.0, 3.0, 4.0)
    assert ratio.memory == ratios.Spread(200 / 600, (200 / 400 + 200 / 600) / 2, 200 / 400)

    text = report.markdown(comparison, MACHINE, "python -m benchmarks.speed")
    assert "| peft_tuned | 3.00 (2.00–4.00) |" in text
    assert "**FAILED**: OutOfMemoryError: no" in text
    assert json.dumps(report.record(comparison, MACHINE, "")["comparison"]["ratios"])


MACHINE = {
    "machine": "test",
    "cores": 2,
    "threads": 1,
    "cpu_capability": "AVX2",
    "memory_gib": 1,
    "load_average": 0.0,
    "python": "3.11",
    "date": "2026-11-23",
    "commit": "none",
    "versions": {"torch": "2.13"},
}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_formula_counts_the_operations_that_torch_counts(recompute: bool) -> None:
    """Counts PEFT on dense weights: all products but attention, which torch counts without its causal mask."""
    config = PRESETS["tiny"].config
    base = LlamaForCausalLM(LlamaConfig(**config))
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules="all-linear"))
    if recompute:
        peft_tuned.recompute(base)
    ids = torch.randint(0, 256, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    found = flops.step_flops(Shape.of(config), 16, [32, 32], 64, "layers" if recompute else "nothing")
    expected = found.needed - found.attention
    if recompute:
        tokens, hidden, layers, rank = 64, 64, 2, 16
        expected += found.recompute - found.attention * 2 / 7
        # transformers' checkpointing computes unused input gradients of the first q, k and v
        expected += 3 * tokens * 2 * (hidden * hidden + rank * hidden)
        # and torch's checkpointing stops before the last product of a layer, B of down_proj
        expected -= layers * tokens * 2 * rank * hidden
    assert counted == expected


def test_a_workload_survives_its_file(tmp_path: Path) -> None:
    made = workload.dense(steps=3, sequences=2, length=8, vocabulary=50, seed=1)
    made.save(tmp_path / "w.safetensors")
    read = workload.Workload.load(tmp_path / "w.safetensors")
    assert read.tokens() == [16, 16, 16]
    assert read.supervised() == [14, 14, 14]
    for step, other in zip(made.steps, read.steps, strict=True):
        for document, same in zip(step, other, strict=True):
            assert torch.equal(document.input_ids, same.input_ids)
            assert torch.equal(document.labels, same.labels)
    assert not torch.equal(made.steps[0][0].input_ids, made.steps[1][0].input_ids)
    assert torch.equal(made.steps[0][0].input_ids, made.steps[-1][0].input_ids)


def test_questions_are_not_supervised_and_padding_is_small(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"question": "why " * (1 + n * 7 % 23), "answer": "because " * (1 + n % 5)} for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    made = workload.question_answer(
        file,
        tiny_llama,
        steps=3,
        documents=16,
        micro_batch=4,
        max_length=96,
        vocabulary=300,
        seed=0,
    )
    assert [len(step) for step in made.steps] == [16, 16, 16]
    assert len(made.steps[0]) == len(made.steps[-1])
    for document in made.steps[0]:
        assert document.labels[0] == -100
        trained = document.labels != -100
        assert trained.any()
        assert torch.equal(document.labels[trained], document.input_ids[trained])
        assert int(document.input_ids.max()) < 300
    batches = [workload.padded(batch) for batch in workload.micro_batches(made.steps[0], 4)]
    positions = sum(batch["input_ids"].numel() for batch in batches)
    assert positions < 1.15 * made.tokens()[0]


def test_our_packed_layout_holds_the_same_documents(job: Job) -> None:
    documents = [workload.Document(torch.arange(n) + 1, torch.arange(n)) for n in (5, 30, 9, 20)]
    packing = dataclasses.replace(job, flags=("packing",))
    plain, packed = ours.lay_out(documents, job), ours.lay_out(documents, packing)
    assert sum(b.tokens for b in plain) == sum(b.tokens for b in packed) == 64
    assert sum(b.supervised for b in plain) == sum(b.supervised for b in packed)
    assert sum(len(b.input_ids) for b in plain) == 4
    assert sum(len(b.input_ids) for b in packed) == 3


def test_contenders_are_chosen_by_name() -> None:
    names = [contender.name for contender in field("cpu", real=False)]
    assert len(set(names)) == len(names)
    assert [c.name for c in chosen("qlora,trl +ckpt", "cpu", real=False)] == [
        "qlora +ckpt",
        "qlora +mlp",
        "qlora",
        "trl +ckpt",
    ]
    with pytest.raises(SystemExit, match="no contender 'axolotl'"):
        chosen("axolotl", "cpu", real=False)
    for contender in field("cuda", real=True):
        assert (Path(report.__file__).parent / "contenders" / f"{contender.program}.py").is_file()


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("print('a library talks'); print(Answer(losses=[1.0]).to_json())", None),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import time; time.sleep(60)", "not done after 3 s"),
    ],
)
def test_a_process_answers_fails_or_is_terminated(
    tmp_path: Path, job: Job, program: str, error: str | None
) -> None:
    file = tmp_path / "contender.py"
    file.write_text(f"from benchmarks.speed.job import Answer\n{program}\n")
    answer = Runner(timeout=3.0).run(Contender(str(file)), job, tmp_path)
    if error is None:
        assert answer.losses == [1.0]
        assert answer.error is None
    else:
        assert error in (answer.error or "")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "tiny-mixture"])
def test_the_command_compares_in_fresh_processes(tmp_path: Path, preset: str) -> None:
    command = (
        f"-m benchmarks.speed --preset {preset} --rounds 1 --warmup 1 --steps 2 --contenders qlora,peft_tuned"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, *shlex.split(command), "--name", "it", "--cache", tmp_path, "--out", tmp_path],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    data = json.loads((tmp_path / "it.json").read_text())
    assert data["comparison"]["failed"] == {}
    assert {score["contender"]["program"] for score in data["comparison"]["scores"]} == {
        "qlora",
        "peft_tuned",
    }
    assert "qlora +ckpt" in (tmp_path / "it.md").read_text()


def row_of_profile(name: str, device: DeviceType, **times: Any) -> SimpleNamespace:
    """Return a row as torch's profiler gives it."""
    row = {"self_cpu_time_total": 0, "self_device_time_total": 0, "is_user_annotation": False}
    return SimpleNamespace(key=name, device_type=device, input_shapes=[], **(row | times))


def test_a_profile_counts_each_kernel_once() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    rows = [
        row_of_profile("aten::mm", cpu, self_cpu_time_total=500, self_device_time_total=3000),
        row_of_profile("nvjet_hsh_128x256_64x4_TNT", cuda, self_device_time_total=3000),
        row_of_profile("qlora step", cpu, self_cpu_time_total=70, self_device_time_total=9000, is_user_annotation=True),
        row_of_profile("qlora step", cuda, self_device_time_total=9000, is_user_annotation=True),
        row_of_profile("_dequantize", cuda, self_device_time_total=1000),
        row_of_profile("void pytorch_flash::flash_bwd_kernel<...>", cuda, self_device_time_total=2000),
        row_of_profile("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", cuda, self_device_time_total=1500),
        row_of_profile("aten::add", cpu, self_cpu_time_total=40),
    ]  # fmt: skip
    assert profile.grouped(rows, rank=16, vocabulary=256, cuda=True) == {
        "matrix products": 3.0,
        "dequantization": 1.0,
        "attention, backward": 2.0,
        "attention, forward": 1.5,
    }
    assert profile.grouped(rows[:1], rank=16, vocabulary=256) == {"products of the base": 0.5}


def test_the_record_names_attention_and_kernels(answers: dict[str, Answer]) -> None:
    assert "scaled_dot_product" in answers["qlora"].settings["attention"]
    assert answers["qlora"].settings["kernels"] == {}  # on a CPU none is used


def test_a_kernel_that_fell_back_fails_the_contender(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(paths.KERNELS[0], "_trusted", {place: True})
    monkeypatch.setattr(paths.KERNELS[2], "_trusted", {place: False})
    states = paths.kernel_states("cuda")
    assert (states["silu_product"], states["normalize"], states["rotate"]) == (
        "runs",
        "fell back",
        "not used",
    )
    monkeypatch.setattr(ours, "kernel_states", lambda device: states)
    with pytest.raises(RuntimeError, match=r"fell back to plain torch: normalize$"):
        ours.train(job, Meter(job))
    monkeypatch.setenv("QLORA_KERNELS", "off")
    assert set(paths.kernel_states("cuda").values()) == {"off"}


def test_the_common_checkpoint_has_a_tokenizer(prepared: Prepared) -> None:
    """Unsloth loads the tokenizer with the model."""
    tokenizer = AutoTokenizer.from_pretrained(prepared.base)
    assert tokenizer.decode(tokenizer("a tokenizer").input_ids, skip_special_tokens=True) == "a tokenizer"


def test_a_kernel_is_timed_with_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    passes = gpu_kernels.passes(gpu_kernels.TINY, "cpu")
    for work, arguments in passes.items():
        record = gpu_kernels.measured(work, arguments, "cpu")
        assert record["kernel_ms"] > 0
        assert record.get("state", "runs") == "runs", record
    work, arguments = next(iter(passes.items()))
    monkeypatch.setattr(triton_kernels, work.kernel, lambda *_: None)
    assert "error of" in gpu_kernels.measured(work, arguments, "cpu")["state"]
