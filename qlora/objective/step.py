"""One training step on one batch: token ids in, loss and gradients out.

The only `backward()` of the package. Training and evaluation call it with real tensors; a memory forecast can
run it under FakeTensorMode, so what is forecast is what will happen. It knows models, not files or recipes.

The loss of an optimizer step is the sum of the token losses divided by the supervised tokens of the whole
step, over all its micro-batches: K micro-batches equal one batch, whatever their lengths. (Averaging the
micro-batches' means instead weighs tokens of short answers more: huggingface/transformers#34191.)

The phases forward, loss, backward and evaluation are announced (`qlora.runtime.phases`): a profiler shows them, and the
memory room (`qlora.memory.live`) books live bytes by them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora.data import Batch
from qlora.objective.causal_lm import loss_sum
from qlora.runtime.phases import Phase, announce


def fold_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that randomness is a function and not a state to save."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    rank: int = 0,
    processes: int = 1,
    loss_chunk: int | None = None,
) -> Tensor:
    """Add the gradients of one optimizer step to the parameters' `.grad`.

    `batches` are all micro-batches of the step; process `rank` of `processes` works on every `processes`-th of
    them, so the sum over the processes is the step. Dropout of a micro-batch depends on (seed, step,
    micro-batch) alone.

    Returns:
        this process's share of the mean loss per supervised token (nats, fp32 scalar, on the device).
    """
    supervised = sum(batch.supervised for batch in batches)
    assert supervised > 0, "a step without a supervised token; the data package must not make one"
    total = torch.zeros((), device=next(model.parameters()).device)
    for index, batch in list(enumerate(batches))[rank::processes]:
        torch.manual_seed(fold_seed(seed, step, index))
        with announce(Phase.FORWARD):
            loss = loss_sum(model, batch, loss_chunk=loss_chunk) / supervised
        with announce(Phase.BACKWARD):
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: int = 0,
    processes: int = 1,
    loss_chunk: int | None = None,
) -> tuple[Tensor, int]:
    """The summed loss (nats, fp32 scalar) over this process's share of `batches`, and the supervised tokens of all.

    Gradients and the training mode are left as they were.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    with evaluation_mode(model), announce(Phase.EVALUATION):
        for batch in batches[rank::processes]:
            total += loss_sum(model, batch, loss_chunk=loss_chunk)
    return total, sum(batch.supervised for batch in batches)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while: no dropout, no checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
