"""The forecast against the measured peak of live tensor bytes, over architectures and settings."""

import itertools
import random
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures_for_tests import ARCHITECTURES, config, recipe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import Gemma3Config
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.architectures import tiny
from qlora.adapter.methods import METHODS as ADAPTERS
from qlora.memory import forecast as forecasting
from qlora.memory.architecture import architecture
from qlora.memory.forecast import Forecast, forecast
from qlora.memory.inventory import inventory
from qlora.memory.live import LiveBytes, Trace
from qlora.memory.parts import PARTS
from qlora.memory.plan import changed
from qlora.memory.workload import Workload, assumed
from qlora.model.prepare import build
from qlora.objective import objective_of
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.step import accumulate, evaluate
from qlora.optim.methods import METHODS
from qlora.recipe import Recipe
from qlora.runtime.device import on_cuda
from qlora.runtime.phases import Phase, announce

SAMPLES = 3
"""number of settings tried with every architecture, drawn so that every pair of values occurs"""


def foreseen(recipe: Recipe, workload: Workload, *, cuda: bool = False) -> Forecast:
    return forecast(recipe, workload, architecture(recipe, cuda=cuda), cuda=cuda)


def has_our_layers(recipe: Recipe) -> bool:
    _, mlp_alone = architecture(recipe, cuda=False).recomputed
    return mlp_alone is not None


def measured(recipe: Recipe, workload: Workload) -> Trace:
    """Run a real step and a real evaluation and count their live bytes."""
    model, optimizer = build(recipe, "cpu")
    read_documents_if_apart(model)
    objective = objective_of(recipe)
    course = ADAPTERS[recipe.adapter.method].course(model, recipe.adapter, 10)
    with LiveBytes(inventory(model, optimizer, course)) as live:
        optimizer.zero_grad()
        accumulate(model, [workload.train], objective, seed=0, step=0, penalty=course.penalty)
        with announce(Phase.UPDATE):
            optimizer.clip(0.3)
            optimizer.step(1e-4)
            course.after_step(0)
        if workload.evaluation is not None:
            evaluate(model, [workload.evaluation], objective)
    return live.trace()


def assert_right(forecast: Forecast, real: Trace) -> None:
    """Assert 1% accuracy of the total and of each phase, and 3% of every part above 5% of the total."""
    phase, parts = forecast.trace.peak()
    real_phase, real_parts = real.peak()
    total = sum(real_parts.values())
    assert forecast.total_bytes == pytest.approx(total, rel=0.01)
    # If two phases have the same peak up to rounding, both are right, but their parts differ
    assert real.phases()[phase] >= total - max(4096, 0.001 * total), (phase, real_phase)
    for part, size in real_parts.items():
        if phase == real_phase and size > 0.05 * total:
            assert parts[part] == pytest.approx(size, rel=0.03), part
    for name, size in real.phases().items():
        assert forecast.trace.phases()[name] == pytest.approx(size, rel=0.01, abs=4096), name


SETTINGS = list(
    itertools.product(
        (True, False, 3), (False, True), METHODS, ("float32", "bfloat16"), (0.0, 0.1), (1024, 40)
    )
)


LONG = ("olmo3", "smollm3", "glm", "glm4", "cohere2")
"""architectures that only the slow tests try"""

SAMPLED = [
    pytest.param(
        name,
        number,
        marks=[] if (number == 0 or name == "llama") and name not in LONG else pytest.mark.slow,
    )
    for name in ARCHITECTURES
    for number in range(SAMPLES)
]


@pytest.mark.parametrize(("architecture", "number"), SAMPLED)
def test_forecast_and_measurement_agree(tmp_path: Path, architecture: str, number: int) -> None:
    # seven layers, more than a forecast runs
    draw = random.Random(f"{architecture} {number}")
    layers, mlps = ((7, 0), (0, 4), (2, 3))[number % SAMPLES]
    if not has_our_layers(recipe(tmp_path, architecture)):
        mlps = 0
    _, packing, optimizer, dtype, dropout, chunk = draw.choice(SETTINGS)
    made = recipe(
        tmp_path,
        architecture,
        layers=7,
        base={"compute_dtype": dtype},
        adapter={} if architecture == "gpt2" else {"dropout": dropout},
        data={"packing": packing},
        training={"activation_checkpointing": {"full": layers, "mlp": mlps}, "loss_chunk": chunk},
        optimizer={"name": optimizer},
    )
    workload = assumed(made)
    assert_right(foreseen(made, workload), measured(made, workload))


@example(
    shape={
        "hidden_size": 192,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 173,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    rows=1,
    tokens=9,
    checkpointed=0,
    mlps=0,
    rank=1,
    double_quant=False,
    targets="attention",
)  # forward and evaluation have the same size
@given(
    shape=st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from([64, 128, 192]),
            "intermediate_size": st.sampled_from([64, 160, 256]),
            "num_hidden_layers": st.integers(1, 9),
            "vocab_size": st.integers(100, 3000),
            "tie_word_embeddings": st.booleans(),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
        }
    ),
    rows=st.integers(1, 4),
    tokens=st.integers(9, 150),
    checkpointed=st.integers(0, 9),
    mlps=st.integers(0, 9),
    rank=st.sampled_from([1, 4, 16]),
    double_quant=st.booleans(),
    targets=st.sampled_from(["attention", "all-linear"]),
)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forecast_and_measurement_agree_for_any_shape(
    tmp_path: Path,
    shape: dict[str, Any],
    rows: int,
    tokens: int,
    checkpointed: int,
    mlps: int,
    rank: int,
    double_quant: bool,
    targets: str,
) -> None:
    from architectures_for_tests import config

    made = recipe(
        tmp_path,
        "llama",
        base={"double_quant": double_quant},
        adapter={"rank": rank, "targets": targets},
        data={"max_length": tokens},
        training={
            "micro_batch_size": rows,
            "global_batch_size": rows,
            "activation_checkpointing": {"full": checkpointed, "mlp": mlps},
        },
    )
    config("llama", **shape).save_pretrained(tmp_path)
    workload = assumed(made)
    assert_right(foreseen(made, workload), measured(made, workload))


@pytest.mark.parametrize(
    ("architecture", "checkpointing", "offload"),
    [
        ("llama", "full", False),
        ("qwen2", {"full": 4, "mlp": 3}, False),
        ("qwen3", {"full": 7, "mlp": 2}, True),
        ("gemma2", "none", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3", "none", False),
                ("phi3", {"full": 5}, False),
                ("mistral", {"mlp": 5}, False),
                ("llama", "full", True),
                ("phi3", {"full": 8}, True),
                ("olmo2", {"full": 4, "mlp": 3}, False),
                ("gemma2", {"full": 4, "mlp": 3}, False),
                ("gemma2", {"full": 9}, True),
                ("deepseek_v3", {"full": 4}, False),
                ("gemma3_text", "full", False),
                ("olmo3", "none", False),
                ("cohere2", "full", False),
                ("gpt_oss", {"full": 4}, False),
                ("qwen3_next", "none", False),
                ("mixtral", "full", False),
                ("jamba", "none", False),
            )
        ),
    ],
)
def test_a_few_layers_forecast_all_of_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    checkpointing: Any,
    offload: bool,
) -> None:
    made = recipe(
        tmp_path,
        architecture,
        layers=11,
        training={
            "activation_checkpointing": checkpointing,
            "activation_offloading": offload,
            "micro_batch_size": 4,
        },
        data={"held_out": 0},  # an evaluation is the same in every layer and is not scaled up
    )
    stretched = foreseen(made, assumed(made), cuda=offload)
    monkeypatch.setattr(forecasting, "NEIGHBOURS", 99)
    monkeypatch.setattr(forecasting, "NEIGHBOURS_OFFLOADED", 99)
    whole = foreseen(made, assumed(made), cuda=offload)
    assert stretched.trace.parts.shape == whole.trace.parts.shape
    assert (stretched.trace.parts == whole.trace.parts).all()


def test_attention_with_extra_arguments_is_forecast_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a model keeps transformers' attention with padding, as Gemma 2 did under transformers 5.17."""
    forward = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", partialmethod(forward, s_aux=torch.ones(4)))
    made = recipe(tmp_path, "llama")
    monkeypatch.setattr("qlora.model.decoder_layer.LAYER_SPECS", {})  # our layer passes no extra argument
    assert architecture(made, cuda=False).padded
    workload = assumed(made)
    assert_right(foreseen(made, workload), measured(made, workload))


def test_a_few_layers_do_not_represent_layers_that_run_in_a_loop(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.hrm_text")
    made = recipe(tmp_path, "llama")
    assert len(set(architecture(made, cuda=False).shapes.kinds())) == 1
    tiny.config("hrm_text").save_pretrained(tmp_path)
    found = architecture(made, cuda=False)
    assert found.shapes.kinds() == (0, 1, 2, 3), "four layers run sixteen times"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("inkling2_text", {"layer_types": ["hybrid"] * 9, "mlp_layer_types": ["sparse"] * 9}),
        ("inkling2_loop_text", {"layer_types": ["hybrid"] * 9, "mlp_layer_types": ["sparse"] * 9}),
    ],
)
def test_a_few_layers_do_not_represent_layers_that_hand_on_more_than_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    pytest.importorskip("transformers.models.inkling2")
    made = recipe(tmp_path, "llama", data={"held_out": 0})
    tiny.config(name, num_hidden_layers=9, **changes).save_pretrained(tmp_path)
    found = foreseen(made, assumed(made))
    monkeypatch.setattr(forecasting, "NEIGHBOURS", 99)
    assert np.array_equal(found.trace.parts, foreseen(made, assumed(made)).trace.parts)


def test_layers_of_a_vision_tower_are_no_layers_of_the_forecast(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama")
    text = config("gemma3_text", num_hidden_layers=3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28}
    tower = {**sizes, "num_hidden_layers": 5, "vision_use_head": False}
    whole = Gemma3Config(text_config=text.to_dict(), vision_config=tower)
    whole.architectures = ["Gemma3ForConditionalGeneration"]
    whole.save_pretrained(tmp_path)
    arch = architecture(made, cuda=False)
    assert any("vision_tower" in name for name, _ in arch.model.named_modules())
    assert arch.layers == 3


def test_a_pattern_for_one_layer_is_counted(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=8, adapter={"rank_pattern": {"layers.5.self_attn.q_proj": 64}})
    workload = assumed(made)
    assert_right(foreseen(made, workload), measured(made, workload))


def test_a_forecast_leaves_nothing_behind(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", optimizer={"name": "adamw_8bit"})
    workload = assumed(made)
    before, state = measured(made, workload), torch.get_rng_state()
    foreseen(made, workload, cuda=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not on_cuda(torch.empty(1))
    after = measured(made, workload)
    assert (after.totals == before.totals).all()


def test_on_a_gpu_the_state_is_paged_and_logits_are_fp32(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "llama",
        base={"compute_dtype": "bfloat16"},
        adapter={"rank": 64},
        optimizer={"name": "paged_adamw_32bit"},
    )
    cpu, gpu = (foreseen(made, assumed(made), cuda=cuda) for cuda in (False, True))
    # remainder of rounding and two moments of every trained parameter; in managed memory on the GPU
    for found, part in ((cpu, "optimizer_state"), (gpu, "optimizer_state_paged")):
        assert found.trace.peak()[1][part] == 10 * found.trained_parameters
    assert gpu.trace.peak()[1]["device_context"] > 0
    for found in (cpu, gpu):  # the scratch of dequantized weights is a separate part on both
        column = list(PARTS).index("dequantization")
        assert found.trace.parts[:, column].max() > 0
    assert cpu.trace.peak()[1]["device_context"] == 0


GIB = 2**30


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("llama-7b", 5, 9),
        ("llama-65b", 40, 49),
        pytest.param("llama-13b", 9, 14, marks=pytest.mark.slow),
        pytest.param("llama-33b", 22, 28, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name: str, low: float, high: float) -> None:
    """One row of 512 tokens, as in QLoRA's figure 6: 6.9, 11.3, 24.7 and 45.0 GB."""
    from qlora.memory.estimate import estimate

    overrides = ["training.micro_batch_size=1", "training.global_batch_size=1", "training.device=auto"]
    overrides.append("data.max_length=512")
    found = estimate(Recipe.load(name, overrides))
    assert low * 1e9 < found.memory["forecast"]["total_bytes"] < high * 1e9


@pytest.mark.slow
def test_one_forecaster_gives_the_results_of_separate_forecasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models and traces are shared, also if layers that were checkpointed no longer are."""
    made = recipe(tmp_path, "llama", layers=9, data={"packing": True}, adapter={"dropout": 0.1})
    arch = architecture(made, cuda=True)
    forecaster = forecasting.Forecaster(arch, cuda=True)
    traced = []
    trace = forecasting._trace
    monkeypatch.setattr(forecasting, "_trace", lambda *args: traced.append(args) or trace(*args))
    workload = assumed(made)

    def counted(layers: int, mlps: int) -> Recipe:
        return changed(made, activation_checkpointing={"full": layers, "mlp": mlps})

    shared = {
        counts: forecaster.forecast(counted(*counts), workload) for counts in ((9, 0), (0, 0), (0, 3), (0, 5))
    }
    assert len(traced) == 3 + 1  # (0, 3) and (0, 5) share a trace, and all share that of the evaluation
    for counts, found in shared.items():
        alone = forecast(counted(*counts), workload, arch, cuda=True)
        assert found.trace.marks == alone.trace.marks
        start = next(mark.index for mark in alone.trace.marks if mark.phase == Phase.EVALUATION)
        assert (found.trace.parts[:start] == alone.trace.parts[:start]).all()
        # Of an evaluation only the peak is the same, because the rest repeats with the layers that ran
        peaks = [trace.parts[start + trace.totals[start:].argmax()] for trace in (found.trace, alone.trace)]
        assert (peaks[0] == peaks[1]).all()
        assert found.host_bytes == alone.host_bytes


@pytest.mark.slow  # by default, mixtral has this loss in the test above
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed", [0, 2, 7])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_forecast_and_measurement_agree_with_a_load_balancing_loss(
    tmp_path: Path, architecture: str, recomputed: int, dtype: str
) -> None:
    made = recipe(
        tmp_path,
        architecture,
        layers=7,
        base={"compute_dtype": dtype},
        adapter={"targets": ["q_proj"]},
        data={"packing": True, "max_length": 256},
        training={"activation_checkpointing": {"full": recomputed, "mlp": 0}},
    )
    # so many experts, and so small, that the routers count
    experts = {"num_local_experts": 96, "num_experts": 96, "moe_intermediate_size": 8, "intermediate_size": 8}
    config(architecture, num_hidden_layers=7, output_router_logits=True, **experts).save_pretrained(tmp_path)
    workload = assumed(made)
    forecast = foreseen(made, workload)
    assert_right(forecast, measured(made, workload))
    off = foreseen(changed(made, router_loss="off"), workload)
    assert forecast.total_bytes > 1.02 * off.total_bytes or recomputed > 2
