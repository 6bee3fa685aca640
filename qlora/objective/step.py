"""One training step on one batch: token ids in, loss and gradients out.

The only `backward()` of the package. Training and evaluation call it with real tensors; a memory forecast can
run it under FakeTensorMode, so what is forecast is what will happen. It knows models, not files or recipes.

The loss of an optimizer step is the sum of the token losses divided by the supervised tokens of the whole
step, over all its micro-batches: K micro-batches equal one batch, whatever their lengths. (Averaging the
micro-batches' means instead weighs tokens of short answers more: huggingface/transformers#34191.)

The phases forward, loss, backward and evaluation are announced (`qlora.runtime.phases`): a profiler shows them, and the
memory room (`qlora.memory.live`) books live bytes by them.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from qlora.data import Batch
from qlora.objective.causal_lm import CausalLM
from qlora.objective.objective import Loss, Objective
from qlora.ops.dropout import drawn_by_row
from qlora.runtime.phases import Phase, announce
from qlora.runtime.seeds import fold_seed

CAUSAL_LM = CausalLM()


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = CAUSAL_LM,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    processes: int = 1,
) -> Loss:
    """Add the gradients of one optimizer step to the parameters' `.grad`.

    `batches` are all micro-batches of the step; process `rank` of `processes` works on every `processes`-th of
    them, so the sum over the processes is the step. LoRA's dropout of a row depends on (seed, step, number of
    the row in the step) alone.

    Returns:
        this process's share of the mean loss and metrics (per supervised token, of causal language modelling).
    """
    weight = sum(map(objective.weight, batches))
    assert weight > 0, "a step without a supervised token; the data package must not make one"
    total = _nothing(objective, next(model.parameters()).device)
    first_rows = itertools.accumulate((len(batch.input_ids) for batch in batches), initial=0)
    for batch, first in list(zip(batches, first_rows, strict=False))[rank::processes]:
        torch.manual_seed(fold_seed(seed, step, first))  # for a model's own dropout
        with drawn_by_row(fold_seed(seed, step), first):
            with announce(Phase.FORWARD):
                loss = _divided(objective.loss(model, batch), weight)
            with announce(Phase.BACKWARD):
                loss.sum.backward()
        total = _added(total, loss)
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = CAUSAL_LM,
    *,
    rank: int = 0,
    processes: int = 1,
) -> tuple[Loss, int]:
    """The summed loss and metrics of this process's share of `batches`, and the weight of all.

    Gradients and the training mode are left as they were.
    """
    total = _nothing(objective, next(model.parameters()).device)
    with evaluation_mode(model), announce(Phase.EVALUATION):
        for batch in batches[rank::processes]:
            total = _added(total, objective.loss(model, batch))
    return total, sum(map(objective.weight, batches))


def _nothing(objective: Objective, device: torch.device) -> Loss:
    """Zeros: a process without a micro-batch adds up as many numbers as the others."""
    return Loss(
        torch.zeros((), device=device), {n: torch.zeros((), device=device) for n in objective.metrics}
    )


def _divided(loss: Loss, weight: int) -> Loss:
    return Loss(loss.sum / weight, {name: metric / weight for name, metric in loss.metrics.items()})


def _added(total: Loss, loss: Loss) -> Loss:
    metrics = {name: metric + loss.metrics[name] for name, metric in total.metrics.items()}
    return Loss(total.sum + loss.sum.detach(), metrics)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while: no dropout, no checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
