"""The speed benchmark's mixtures of experts: qlora and PEFT train alike, and the operations are counted right."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed import fairness, flops, report
from benchmarks.speed.contenders import Contender, chosen, peft_loop, peft_tuned
from benchmarks.speed.contenders import qlora as ours
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter
from benchmarks.speed.prepare import Prepared, Setting, prepare
from benchmarks.speed.presets import PRESETS, Shape
from benchmarks.speed.rounds import Comparison
from benchmarks.speed.workload import Workload

pytestmark = [
    # PEFT 0.21 reads a transformers 4 attribute, which transformers 5 deprecates
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # and does not find the parameters of experts that it adapts among its modules
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module"),
]

TOKENS = 64
SHAPE = Shape.of(PRESETS["tiny-mixture"].config)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    cache = tmp_path_factory.mktemp("speed")
    return Setting(PRESETS["tiny-mixture"], steps=3, dtype="float32", device="cpu", cache=str(cache))


@pytest.fixture(scope="module")
def prepared(setting: Setting) -> Prepared:
    return prepare(setting)


@pytest.fixture(scope="module")
def job(setting: Setting, prepared: Prepared) -> Job:
    return prepared.job(setting, warmup=1, lr=2e-3)


@pytest.fixture(scope="module")
def answers(job: Job) -> dict[str, list[Answer]]:
    """Return one round of two contenders, and of one that does not train."""
    idle = dataclasses.replace(job, lr=0.0)
    return {
        "qlora": [ours.train(job, Meter(job))],
        "peft_tuned": [peft_tuned.train(job, Meter(job))],
        "idle": [ours.train(idle, Meter(idle))],
    }


def test_qlora_and_peft_train_the_same_experts(answers: dict[str, list[Answer]]) -> None:
    assert fairness.problems(answers, "float32").keys() == {"idle"}
    (mine,), (theirs,) = answers["qlora"], answers["peft_tuned"]
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert mine.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-3)
    assert mine.adapter_change == pytest.approx(theirs.adapter_change, rel=1e-2)


def test_peft_has_the_experts_unquantized_and_the_ranks_of_the_file(job: Job) -> None:
    model = peft_loop.adapted(peft_loop.load(job), job)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert kinds["gate_up_proj"] == kinds["down_proj"] == torch.float32
    linear = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    assert linear.weight.dtype == torch.uint8
    stored = load_file(job.adapter)
    found = peft_loop.adapter(model)
    assert {name: p.shape for name, p in found.items()} == {name: a.shape for name, a in stored.items()}
    name = "model.layers.1.mlp.experts.gate_up_proj.lora_a"
    assert found[name].shape == (4 * 8, 64), "rank 16 over two active experts, for each of four"
    assert torch.equal(found[name], stored[name].float())


def test_the_formula_counts_the_active_experts_only(job: Job, prepared: Prepared) -> None:
    """Counts transformers' model without an adapter; its embedding wants a gradient, so q, k and v give one too."""
    config = AutoConfig.from_pretrained(prepared.base)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for op, count in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    found = flops.step_flops(SHAPE, job.rank, [32, 32], TOKENS)
    assert counted == found.base + found.head + TOKENS * 2 * 3 * 64 * 64

    sizes = {name: tensor.numel() for name, tensor in load_file(job.adapter).items()}
    used = sum(size // 2 if "experts" in name else size for name, size in sizes.items())  # two of four
    assert found.lora == TOKENS * (6 * used - 2 * 3 * 16 * 64)


def test_recomputation_of_a_mixture_leaves_out_the_last_product_and_alone_the_router() -> None:
    again = {
        part: flops.step_flops(SHAPE, 16, [32, 32], TOKENS, part).recompute
        for part in ("layers", "layers without down_proj", "gate and up")
    }
    down = 2 * (64 * 64 + 8 * 128)  # two active experts, of rank 8
    assert again["layers"] - again["layers without down_proj"] == 2 * TOKENS * down * SHAPE.layers
    wide = 2 * (64 * 128 + 8 * (64 + 128))
    assert again["gate and up"] == 2 * TOKENS * wide * SHAPE.layers
    assert [Contender("qlora", (flag,)).recomputed for flag in ("ckpt", "mlp")] == [
        "layers without down_proj", "gate and up",
    ]  # fmt: skip


def test_a_recompute_of_experts_skips_the_last_product(job: Job) -> None:
    """Torch counts nearly as many operations as `flops`; with another W_down it would count more."""
    found = {}
    for flags in ((), ("ckpt",), ("mlp",)):
        session = ours.Session(dataclasses.replace(job, flags=flags))
        (step, *_) = Workload.load(job.workload).steps
        with FlopCounterMode(display=False) as counted:
            session.step(0, step)
        found[flags] = counted.get_total_flops()
    for flag, part in (("ckpt", "layers without down_proj"), ("mlp", "gate and up")):
        extra = flops.step_flops(SHAPE, 16, [32, 32], TOKENS, part).recompute
        # torch counts no products that are added to others, as those with B
        assert 0.8 * extra < found[flag,] - found[()] < extra


def test_contenders_without_a_form_for_mixtures_are_left_out() -> None:
    names = {contender.name for contender in chosen(None, "cuda", real=False, mixture=True)}
    assert {"qlora", "qlora +ckpt", "peft_tuned", "peft_documented +ckpt"} <= names
    assert not [name for name in names if "unsloth" in name]
    with pytest.raises(SystemExit, match="no contender 'unsloth'"):
        chosen("unsloth", "cuda", real=False, mixture=True)


def test_the_report_names_the_experts(
    setting: Setting, prepared: Prepared, answers: dict[str, list[Answer]]
) -> None:
    machine = dict.fromkeys(
        ("machine", "cores", "threads", "cpu_capability", "memory_gib", "load_average", "python", "date", "commit"), ""
    )  # fmt: skip
    contenders = [Contender("qlora"), Contender("peft_tuned")]
    comparison = Comparison(setting, prepared, contenders, 1, dict(list(answers.items())[:2]), [1e9])
    text = report.markdown(comparison, machine | {"versions": {}}, "python -m benchmarks.speed")
    assert "2 layers, 4 experts of intermediate 64 a layer, 2 active" in text
    assert "with the experts, which bitsandbytes leaves in float32 for the peers" in text
    assert "every linear layer but routers, r=8 on each expert" in text
    assert "| peft_tuned |" in text

    def taking(name: str, seconds: float) -> Answer:
        return dataclasses.replace(answers[name][0], processor_seconds=[9.0, seconds, seconds])

    comparison.answers = {"qlora": [taking("qlora", 2.0)], "peft_tuned": [taking("peft_tuned", 5.0)]}
    text = report.markdown(comparison, machine | {"versions": {}}, "python -m benchmarks.speed")
    _, after = text.split("Processor time of the peer's step divided by that of qlora")
    assert "| peft_tuned | 2.50 (2.50–2.50) |" in after
