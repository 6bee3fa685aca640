"""The verdict on a merge: its numbers against plain fp64 formulas, and its choice against the documented rules."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_for_tests import update
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter import LoraSpec, adapt
from qlora.data import IGNORE_INDEX, Batch
from qlora.merging.compare import SIGNIFICANT_LOSS, Judgement, choose, judge, reference
from qlora.model.load import load_base
from qlora.recipe import Base


@pytest.fixture
def base(tiny_llama: Path) -> Base:
    return Base(model=str(tiny_llama), compute_dtype="float32")


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2048, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[1, 7:] = IGNORE_INDEX
    return Batch(ids, labels, None, tokens=18, supervised=int((labels != IGNORE_INDEX).sum()))


def log_probabilities(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return fp64 [N, V] of the supervised tokens, and the tokens [N], from the model's own forward."""
    rows, targets = [], []
    with torch.no_grad():
        for batch in batches:
            logits = model.eval()(input_ids=batch.input_ids).logits.double()[:, :-1]
            labels = batch.labels[:, 1:]
            rows.append(logits[labels != IGNORE_INDEX].log_softmax(1))
            targets.append(labels[labels != IGNORE_INDEX])
    return torch.cat(rows), torch.cat(targets)


def test_the_numbers_equal_the_formulas(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.merging.compare.CHUNK", 3)  # chunks that do not divide the number of tokens
    batches = [batch_of(1), batch_of(2)]
    live = update(adapt(load_base(base), LoraSpec(targets="all-linear", dropout=0.5)), seed=1).train()
    other = update(adapt(load_base(base), LoraSpec(targets="all-linear")), size=0.17, seed=1)
    heard = reference(live, batches)
    assert live.training
    found = judge("other", other, heard, weight_bytes=7)
    p, targets = log_probabilities(live, batches)
    q, _ = log_probabilities(other, batches)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-3)
    assert found.kl > 0.0001
    losses = F.nll_loss(q, targets, reduction="none")
    assert torch.allclose(found.losses.double(), losses, atol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    assert 0 < found.agreement < 1
    assert len(found.losses) == sum(batch.supervised for batch in batches)
    same = judge("live", live, heard, weight_bytes=7)
    assert (same.kl, same.agreement) == (pytest.approx(0, abs=1e-9), 1.0)


def judgement(
    name: str, loss: float = 1.0, kl: float = 0.0, noise: float = 0.0, tokens: int = 400
) -> Judgement:
    losses = loss + noise * torch.randn(tokens, generator=torch.Generator().manual_seed(len(name)))
    size = 1 if name == "nf4" else 4
    return Judgement(name, kl, math.exp(losses.mean().item()), 1.0, size, losses)


SMALL, LARGE = 0.5 * SIGNIFICANT_LOSS, 3 * SIGNIFICANT_LOSS


@pytest.mark.parametrize(
    ("judged", "expected", "why"),
    [
        # 16 bits: the closest form, unless another is better by a relevant difference
        ([("original", 1.0, 0.2), ("dequantized", 1.0, 0.1)], "dequantized", "closest"),
        ([("original", 1.0, 0.1), ("dequantized", 1.0, 0.2)], "original", "closest"),
        ([("original", 1 - SMALL, 0.2), ("dequantized", 1.0, 0.1)], "dequantized", "closest"),
        ([("original", 1 - LARGE, 0.2), ("dequantized", 1.0, 0.1)], "original", "3.0% below that of dequantized"),
        # NF4 only by asking, whatever it costs
        ([("dequantized", 1.0, 0.1), ("nf4", 1 + SMALL, 0.2)], "dequantized", "nf4, in 25%.*: --onto nf4 writes it$"),
        ([("dequantized", 1.0, 0.1), ("nf4", 1 - LARGE, 0.2)], "dequantized", "by -2.96% .*: --onto nf4 writes it$"),
        ([("dequantized", 1.0, 0.1), ("nf4", 1 + LARGE, 0.2)], "dequantized", "nf4, .* by [+]3.05%$"),
        ([("original", 1.0, 0.2), ("dequantized", 1.0, 0.1), ("nf4", 1 + LARGE, 0.3)], "dequantized", "closest"),
        ([("nf4", 1.0, 0.2)], "nf4", "the only merged model"),
    ],
)  # fmt: skip
def test_the_choice(judged: list[tuple[Any, ...]], expected: str, why: str) -> None:
    import re

    best, reason = choose([judgement(*one) for one in judged])
    assert best.name == expected
    assert re.search(why, reason), reason


def test_differences_within_the_noise_of_a_short_text_decide_nothing() -> None:
    judged = [judgement("dequantized", kl=0.1), judgement("nf4", 0.97, kl=0.2, noise=0.5)]
    best, why = choose(judged)
    assert judged[1].perplexity < judged[0].perplexity
    assert best.name == "dequantized"
    assert "too short to be sure" in why
    one_token = [judgement("dequantized", tokens=1), judgement("nf4", tokens=1)]
    assert choose(one_token)[0].name == "dequantized"


def test_a_removed_loser_cannot_win_later() -> None:
    """Losers are removed from the disk before all forms are judged."""
    one, two, three = (
        judgement("original", kl=0.2),
        judgement("dequantized", kl=0.1),
        judgement("nf4", kl=0.3),
    )
    assert choose([one, two])[0] is two
    assert choose([one, two, three])[0] in (two, three)
