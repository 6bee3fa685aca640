"""The rule of thumb of the LoRA documents: its own examples to the digit, and remarks that hold."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_for_tests import llama_7b, tiny, whole_model

from qlora.adapter import lora_parameter_count
from qlora.memory import rule_of_thumb
from qlora.memory.parts import PARTS
from qlora.recipe.sizes import GIB, MIB, unit_for

GPT3 = 175 * 10**9
GPT3_ADAPTER = 17_500_000
GB = 10**9


def test_full_fine_tuning_of_175b_takes_1_4_tb() -> None:
    estimate = rule_of_thumb.full(GPT3)
    assert estimate == {"adapters": 350 * GB, "gradients": 350 * GB, "optimizer_state": 700 * GB}
    assert sum(estimate.values()) == 1400 * GB


def test_lora_of_175b_takes_350_gb() -> None:
    estimate = rule_of_thumb.lora(GPT3, GPT3_ADAPTER)
    adapter = {"adapters": 35_000_000, "gradients": 35_000_000, "optimizer_state": 70_000_000}
    assert estimate == {"base_unquantized": 350 * GB, **adapter}
    total = sum(estimate.values())
    assert round(total / GB) == 350
    assert round(sum(rule_of_thumb.full(GPT3).values()) / total, 2) == 4.0, "4 times smaller"


def test_the_adapter_of_0_035_gb_has_17_5m_parameters_not_10m() -> None:
    assert rule_of_thumb.lora(GPT3, GPT3_ADAPTER)["adapters"] / GB == 0.035
    assert rule_of_thumb.lora(GPT3, 10_000_000)["adapters"] / GB == 0.02
    assert GPT3 / GPT3_ADAPTER == 10_000


def test_gradients_and_optimizer_take_three_times_the_model() -> None:
    """Printed as "3-4 times model size": their own numbers make it three."""
    estimate = rule_of_thumb.full(GPT3)
    assert (estimate["gradients"] + estimate["optimizer_state"]) / estimate["adapters"] == 3


@pytest.mark.parametrize(
    ("out_features", "in_features", "printed", "exact"),
    [(4096, 4096, 257, 256.0), (5_000, 10_000, 400, 416.7)],
)
def test_a_layer_trains_as_many_times_fewer_parameters_as_printed(
    out_features: int, in_features: int, printed: int, exact: float
) -> None:
    factor = out_features * in_features / lora_parameter_count(out_features, in_features, rank=8)
    assert round(factor, 1) == exact
    assert abs(factor / printed - 1) < 0.05, "differs by more than rounding"


def test_the_share_of_a_hundred_layers() -> None:
    adapter = 100 * lora_parameter_count(4096, 4096, rank=8)
    assert round(adapter / 1e6, 2) == 6.55
    assert round(100 * adapter / 6.48e9, 1) == 0.1
    assert round(100 * adapter / 7e9, 3) == 0.094


def test_the_rules_of_thumb_cover_the_recipes_method_full_and_lora() -> None:
    found: dict[str, Any] = {"total_bytes": GB, "parts": {"base_unquantized": GB}}
    made = rule_of_thumb.as_json("lora", 1000, 10, found)
    assert made["parts"] == made["lora"]["parts"] == rule_of_thumb.lora(1000, 10)
    assert made["total_bytes"] == 2000 + 80
    assert made["full"] == {"total_bytes": 8000, "parts": rule_of_thumb.full(1000)}
    assert rule_of_thumb.as_json("full", 1000, 0, found)["total_bytes"] == 8000
    assert set(made["parts"]) | set(made["full"]["parts"]) <= set(PARTS)


# Remarks


def test_an_estimate_is_judged_against_the_measurement_before_the_forecast() -> None:
    forecast: dict[str, Any] = {"total_bytes": 4 * 2**30, "parts": {}}
    measured = {**forecast, "total_bytes": 8 * 2**30}
    first, *_ = rule_of_thumb.remarks("lora", 3 * 2**30, 0, forecast)
    assert first == "The rule of thumb for LoRA gives 6.00 GiB, the forecast 4.00 GiB: 50% too high."
    first, *_ = rule_of_thumb.remarks("lora", 3 * 2**30, 0, forecast, measured)
    assert first == "The rule of thumb for LoRA gives 6.00 GiB, the measured peak 8.00 GiB: 25% too low."
    first, *_ = rule_of_thumb.remarks("lora", 2 * 2**30, 0, forecast)
    assert first.endswith(": right to within 1%.")


def test_omitted_parts_are_named_with_their_sizes_largest_first() -> None:
    parts = {
        "base_unquantized": 2**30,
        "saved_activations": 2**29,
        "logits_and_loss": 2**30,
        "dequantization": 0,
    }
    found = {"total_bytes": sum(parts.values()), "parts": parts}
    remark = rule_of_thumb.remarks("lora", 2**29, 0, found)[1]
    assert (
        remark
        == "It leaves out 1.50 GiB of the forecast: logits and loss 1.00 GiB, saved activations 0.500 GiB."
    )


def test_nothing_is_said_where_the_estimate_agrees() -> None:
    """A step of exactly what the rule counts leaves the total, and the promises of the LoRA documents."""
    parts = rule_of_thumb.lora(2**30, 2**20)
    remarks = rule_of_thumb.remarks(
        "lora", 2**30, 2**20, {"total_bytes": sum(parts.values()), "parts": parts}
    )
    assert [remark.split(",")[0][:30] for remark in remarks] == [
        "The rule of thumb for LoRA giv", "By the rule of thumb LoRA take", "The adapter has 1"
    ]  # fmt: skip
    parts = rule_of_thumb.full(2**30)
    assert (
        len(rule_of_thumb.remarks("full", 2**30, 0, {"total_bytes": sum(parts.values()), "parts": parts}))
        == 1
    )


def test_nf4_and_fp32_state_are_compared_with_16_bits() -> None:
    parts = {
        "base_nf4": 2**30, "quantization_statistics": 2**25, "base_unquantized": 2**29, "adapters": 2**25,
        "gradients": 2**26, "optimizer_state": 2**24, "optimizer_state_paged": 11 * 2**24,
    }  # fmt: skip
    found = {"total_bytes": sum(parts.values()), "parts": parts}
    text = "\n".join(rule_of_thumb.remarks("lora", 2**31, 2**24, found))
    assert (
        "counts 2 bytes for every frozen weight, 4.00 GiB; NF4 with its statistics and the weights that"
        in text
    )
    assert "are not quantized take 1.53 GiB, 62% less" in text
    assert "2 bytes for its gradient, 0.0312 GiB; the forecast holds 4.0 bytes each, 0.0625 GiB" in text
    assert "here the optimizer keeps 12.0 bytes each, 0.188 GiB, of which 0.172 GiB can be paged out" in text
    assert "for a trained parameter, " not in text, "they agree there"
    parts["optimizer_state_paged"] += parts.pop("optimizer_state")
    assert "0.188 GiB, of which all can be paged out" in "\n".join(
        rule_of_thumb.remarks("lora", 2**31, 2**24, found)
    )
    assert "The adapter has 128 times fewer parameters than the base, 0.781% of it" in text


def test_an_unquantized_base_is_not_called_nf4() -> None:
    found = {"total_bytes": 2**33, "parts": {"base_unquantized": 2**33}}
    (remark,) = (r for r in rule_of_thumb.remarks("lora", 2**31, 0, found) if "frozen weight" in r)
    assert (
        remark == "It counts 2 bytes for every frozen weight, 4.00 GiB; the base takes 8.00 GiB, 100% more."
    )


@given(
    method=st.sampled_from(["lora", "full"]),
    parameters=st.integers(1, 10**12),
    adapter=st.integers(0, 10**10),
    sizes=st.dictionaries(st.sampled_from(list(PARTS)), st.integers(0, 10**12), min_size=1),
)
def test_any_numbers_give_full_sentences(
    method: rule_of_thumb.Method, parameters: int, adapter: int, sizes: dict[str, int]
) -> None:
    found = {"total_bytes": sum(sizes.values()) + 1, "parts": sizes}
    for remark in rule_of_thumb.remarks(method, parameters, adapter, found):
        assert re.fullmatch(r"[TIB][^\n]*\.", remark)
        assert not re.search(r"nan|inf\b|e[+-]\d", remark)


def test_the_examples_of_other_tests_get_remarks() -> None:
    assert "too high" in llama_7b()["documents"]["remarks"][0]
    assert "too low" in tiny()["documents"]["remarks"][0]
    assert "full fine-tuning" in whole_model()["documents"]["remarks"][0]


# Sizes


def test_sizes_are_printed_in_one_unit() -> None:
    assert (unit_for(2**30), unit_for(2**30 - 1), unit_for(0)) == (GIB, MIB, MIB)
    assert [GIB.number(size) for size in (0, 1, 2**30, 1500 * 2**30)] == ["0.00", "<0.01", "1.00", "1,500.00"]
    assert [GIB.text(size) for size in (0, 1, 2**22, 2**30, 2**30 * 999 // 10, 1500 * 2**30)] == [
        "0 GiB", "<0.0001 GiB", "0.00391 GiB", "1.00 GiB", "99.9 GiB", "1,500 GiB"
    ]  # fmt: skip
