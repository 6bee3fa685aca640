"""The arithmetic of a merge: exact up to fp32, rounded once when it is stored, and without side effects."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_for_tests import fingerprint
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.adapter import LoRALinear, LoraSpec
from qlora.quantization import nf4


def layer_of(base: nn.Module, rank: int = 4, dtype: torch.dtype = torch.bfloat16) -> LoRALinear:
    layer = LoRALinear(base, LoraSpec(rank=rank, alpha=3 * rank, dtype=dtype))
    nn.init.normal_(layer.lora_b, std=0.3)
    return layer


def dense_formula(layer: LoRALinear, weight: Tensor) -> Tensor:
    """Return W + scaling B A in fp64."""
    return weight.double() + layer.scaling * (layer.lora_b.double() @ layer.lora_a.double()).detach()


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 70),
    width=st.integers(1, 130),
    rank=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_the_merged_weight_equals_the_formula_in_fp32(
    out: int, width: int, rank: int, dtype: torch.dtype
) -> None:
    layer = layer_of(nn.Linear(width, out).to(dtype), rank)
    expected = dense_formula(layer, layer.base.weight)
    merged = layer.merged_weight()
    assert merged.dtype == torch.float32
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("block_size", [64, 256])
def test_a_weight_in_4_bits_is_dequantized_exactly_first(block_size: int) -> None:
    packed = nf4.quantize(torch.randn(48, 96), block_size=block_size)
    layer = layer_of(nf4.NF4Linear(packed))
    whole = nf4.dequantize(packed, packed.quant_state, torch.float32)
    expected = dense_formula(layer, whole)
    assert (layer.merged_weight() - expected).abs().max() <= 1e-6 * expected.abs().max()
    other = torch.randn(48, 96)
    assert torch.allclose(layer.merged_weight(other).double(), dense_formula(layer, other), atol=1e-6)


def test_a_weight_that_is_stored_transposed_is_returned_as_out_by_in() -> None:
    base = Conv1D(24, 32)
    layer = layer_of(base)
    merged = layer.merged_weight()
    assert merged.shape == (24, 32)
    assert (merged - dense_formula(layer, base.weight.T)).abs().max() <= 1e-6 * merged.abs().max()


def test_the_merged_weight_gives_the_layers_output() -> None:
    layer = layer_of(nn.Linear(32, 24).double(), dtype=torch.float64).eval()
    x = torch.randn(5, 32, dtype=torch.float64)
    merged = layer.merged_weight()
    assert merged.dtype == torch.float64
    assert torch.allclose(nn.functional.linear(x, merged, layer.base.bias), layer(x), atol=1e-12)


def test_rounding_to_16_bits_happens_once() -> None:
    """Adding in bf16 would round the update before the sum, and then the sum."""
    layer = layer_of(nn.Linear(256, 256).bfloat16())
    once = dense_formula(layer, layer.base.weight).bfloat16()
    ours = layer.merged_weight().bfloat16()
    twice = layer.base.weight + layer.scaling * (layer.lora_b @ layer.lora_a)
    assert (ours != once).float().mean() < 0.001  # fp32 and fp64 can lie on two sides of a tie
    assert (twice != once).float().mean() > 0.05


def test_merging_changes_nothing() -> None:
    layer = layer_of(nf4.NF4Linear(nf4.quantize(torch.randn(64, 64))))
    x = torch.randn(3, 64)
    before, answer = fingerprint(layer), layer(x)
    layer.merged_weight().zero_()
    dense = layer_of(nn.Linear(64, 64))
    unchanged = fingerprint(dense)
    dense.merged_weight().zero_()
    assert fingerprint(layer) == before
    assert fingerprint(dense) == unchanged
    assert torch.equal(layer(x), answer)
