"""Attention with capped scores against transformers' eager attention: same numbers, the memory of a chunk of scores."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures_for_tests import config
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from qlora.data import Batch
from qlora.memory.live import LiveBytes
from qlora.model.varlen_attention import CAPPED, NAME, use_capped_attention, visible
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.causal_lm import loss_sum
from qlora.ops import capped_attention as capped_module
from qlora.ops.capped_attention import capped_attention

HEADS, KEY_HEADS, WIDTH, CAP, SCALING = 4, 2, 6, 1.5, 0.7


def inputs(length: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def eager(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, training=True)
    mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
    return eager_attention_forward(module, query, key, value, mask, scaling=SCALING, softcap=CAP)[0]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("masked", ["", "bool", "added"])
def test_outputs_and_gradients_are_those_of_transformers(
    window: int | None, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capped_module, "SCORES", 44)  # four of eleven queries at a time
    seen = visible(11, window, torch.device("cpu")).expand(2, 1, 11, 11).clone()
    if masked:
        seen[1, :, :, :3] = False  # padding on the left, whose queries see nothing
    tensors = inputs(11)
    expected = eager(*tensors, seen)
    mask = (
        seen
        if masked == "bool"
        else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    )
    more = {"mask": mask} if masked else {"window": window}
    y = capped_attention(*tensors, CAP, scaling=SCALING, **more)  # type: ignore[arg-type]
    tokens = slice(3, None) if masked else slice(None)
    torch.testing.assert_close(
        y[:, tokens], expected[:, tokens], rtol=1e-6, atol=1e-6
    )  # theirs has a softmax in fp32
    weights = torch.linspace(-1, 2, y[:, tokens].numel()).view(y[:, tokens].shape)
    ours, theirs = (torch.autograd.grad((x[:, tokens] * weights).sum(), tensors) for x in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_last_queries_see_all_earlier_keys() -> None:
    query, key, value = inputs(9)
    whole = capped_attention(query, key, value, CAP, window=4)
    last = capped_attention(query[:, :, -2:], key, value, CAP, window=4)
    torch.testing.assert_close(last, whole[:, -2:])


def test_scores_of_one_chunk_at_a_time_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped_module, "SCORES", 16 * 256)
    tensors = inputs(256, torch.float32, rows=1)
    scores = HEADS * 256 * 256 * 4
    with LiveBytes() as live:
        y = capped_attention(*tensors, CAP)
        y.sum().backward()
    assert live.trace().totals.max() < scores


def test_a_model_with_capped_scores_gets_our_attention_over_documents() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config("gemma2", attn_logit_softcapping=0.05, sliding_window=8, initializer_range=0.3),
        dtype=torch.float64,
    )
    assert model.config._attn_implementation == "eager"
    lengths = (30, 17)
    documents = [torch.arange(length) * 7 % 500 + 3 for length in lengths]
    rows = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-100)
    labels[:, 0] = -100
    batch = Batch(rows, labels, None, tokens=47, supervised=45, documents=tuple((n,) for n in lengths))
    own = loss_sum(model, batch).item()
    use_capped_attention(model)
    assert model.config._attn_implementation == CAPPED
    with_mask = loss_sum(model, batch).item()
    assert read_documents_if_apart(model)
    assert model.config._attn_implementation == NAME
    end_to_end = loss_sum(model, batch).item()
    assert [with_mask, end_to_end] == pytest.approx([own, own], rel=1e-7)
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert loss_sum(model, batch).item() != pytest.approx(own, rel=1e-5), "the cap matters here"


def test_a_model_without_a_cap_or_in_both_directions_keeps_its_attention() -> None:
    for changes in ({"attn_logit_softcapping": None}, {"use_bidirectional_attention": True}):
        model = AutoModelForCausalLM.from_config(config("gemma2", **changes))
        before = model.config._attn_implementation
        use_capped_attention(model)
        assert model.config._attn_implementation == before != CAPPED
