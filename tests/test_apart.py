"""Documents in one row must not influence each other: leaky models are refused, the others are not."""

from collections.abc import Iterator
from typing import Any

import architectures_for_tests as small
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.lfm2 import modeling_lfm2

from qlora.data import Batch
from qlora.errors import RecipeError
from qlora.model import packed_masks
from qlora.model.varlen_attention import NAME
from qlora.objective.apart import check_packing, influence, read_documents_if_apart
from qlora.objective.causal_lm import hidden_states

DTYPES = [torch.float32, torch.bfloat16]
BY_POSITION = ("llama", "mixtral", "gpt2")
FEW = ("lfm2_moe", "falcon_h1", "bloom")
"""one each of the convolutions, the state-space models and the linear biases"""


def build(architecture: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small.config(architecture), dtype=dtype)
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def assert_refused(architecture: str, dtype: torch.dtype, seed: int) -> None:
    model = build(architecture, dtype, seed)
    before = model.config._attn_implementation
    assert not read_documents_if_apart(model)  # so rows without packing are not laid end to end either
    assert model.config._attn_implementation == before
    with pytest.raises(RecipeError, match=rf"{type(model).__name__} .*Set data\.packing=false"):
        check_packing(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", FEW)
def test_leaky_models_are_refused(architecture: str, dtype: torch.dtype) -> None:
    assert_refused(architecture, dtype, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", small.LEAKY)
def test_every_leaky_model_is_refused_for_every_seed(architecture: str, dtype: torch.dtype) -> None:
    for seed in range(12):
        assert_refused(architecture, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", BY_POSITION)
def test_other_models_may_pack(architecture: str, dtype: torch.dtype) -> None:
    model = build(architecture, dtype)
    check_packing(model)  # with position ids
    assert read_documents_if_apart(model)
    assert model.config._attn_implementation == NAME
    check_packing(model)


@pytest.mark.parametrize("architecture", packed_masks.MODEL_TYPES)
def test_a_model_that_makes_masks_without_position_ids_gets_them(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model = build(architecture, torch.float32)
    assert not read_documents_if_apart(model)
    check_packing(model)
    monkeypatch.setattr(packed_masks, "MODEL_TYPES", ())
    with pytest.raises(RecipeError, match="see each other"):
        check_packing(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [*small.APART, *small.ARCHITECTURES])
def test_no_other_model_is_refused_for_any_seed(architecture: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        model = build(architecture, dtype, seed)
        # documents longer than a chunk are refused with a message of their own
        longest = getattr(model.config, "attention_chunk_size", None)
        if not read_documents_if_apart(model, longest):
            check_packing(model, longest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1, -1])
def test_a_leak_of_a_hundredth_is_seen_in_either_direction(dtype: torch.dtype, shift: int) -> None:
    model = build("llama", dtype)

    def leak(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.01 * output.roll(shift, dims=1)  # as a convolution over two tokens would

    model.get_input_embeddings().register_forward_hook(leak)
    found = influence(model)
    assert 1e-3 < max(found.leak, found.rounding) < 0.3
    with pytest.raises(RecipeError, match="see each other"):
        check_packing(model)


def test_positions_that_continue_are_not_called_a_leak() -> None:
    model = build("llama", torch.float32)
    rotary = model.model.rotary_emb

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return type(rotary).forward(rotary, x, torch.arange(position_ids.shape[1])[None])

    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(  # positions are relative in llama: add absolute ones, as in GPT-2
        lambda module, args, output: output + torch.linspace(0, 1, output.shape[1])[:, None]
    )
    rotary.forward = forward
    with pytest.raises(RecipeError, match="change their positions"):
        check_packing(model)


@pytest.mark.parametrize("error", [TypeError, IndexError, RuntimeError])
def test_a_model_whose_code_fails_on_two_documents_is_refused_by_name(error: type[Exception]) -> None:
    model = build("llama", torch.float32)
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: (_ for _ in ()).throw(error("unexpected keyword")), with_kwargs=True
    )
    before = model.config._attn_implementation
    assert not read_documents_if_apart(model)
    assert model.config._attn_implementation == before
    with pytest.raises(
        RecipeError, match=rf"data\.packing: LlamaForCausalLM .*{error.__name__}: unexpected keyword"
    ):
        check_packing(model)


@pytest.fixture
def convolution_with_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Stand-in for the kernel of the package causal-conv1d: restarts at each document of `seq_idx` [1, T]."""
    seen: list[Tensor] = []

    def causal_conv1d_fn(
        x: Tensor, weight: Tensor, bias: Any, activation: str | None = None, **more: Any
    ) -> Tensor:
        lengths = [x.shape[-1]]
        if "seq_idx" in more:
            seen.append(more["seq_idx"])
            lengths = torch.unique_consecutive(more["seq_idx"][0], return_counts=True)[1].tolist()
        width = weight.shape[-1]
        parts = [
            F.conv1d(F.pad(part, (width - 1, 0)), weight[:, None], bias, groups=len(weight))
            for part in x.split(lengths, dim=-1)
        ]
        return torch.cat(parts, dim=-1)

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", causal_conv1d_fn)
    yield seen
    assert seen


def test_a_convolution_gets_the_bounds_of_the_documents_if_its_kernel_takes_them(
    convolution_with_bounds: list[Tensor],
) -> None:
    model = build("lfm2", torch.float32).eval()
    check_packing(model)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 0]])
    batch = Batch(ids, ids.clone(), positions, tokens=16, supervised=13, documents=((4, 5), (7,)))
    with torch.no_grad():
        packed = hidden_states(model, batch)[0][0]
        alone = [
            hidden_states(model, Batch(row[None], row[None].clone(), None, tokens=len(row), supervised=1))[0][
                0
            ]
            for row in (ids[0, :4], ids[0, 4:], ids[1, :7])
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
