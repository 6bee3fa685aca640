"""The training step: from the micro-batches of a step to loss and gradients.

This is the only `backward()` of the package. Training and evaluation call it with real tensors. The memory forecast can
run it under FakeTensorMode, so that it measures the same code. The step knows models, but no files or recipes.

The loss of an optimizer step is the sum of the token losses over all its micro-batches, divided by the supervised
tokens of the whole step. So K micro-batches equal one batch, whatever their lengths. (Averaging the means of the
micro-batches instead gives tokens of short answers more weight: huggingface/transformers#34191.)

An auxiliary loss, such as the load-balancing loss of a mixture's routers, is a function of means over the tokens of a
micro-batch: two micro-batches do not add up to one, in transformers neither. So that it depends on the micro-batches in
nothing else, each one's auxiliary loss counts by its share of the step's tokens, without padding: the number of
processes, the order and the padding change nothing, and equal micro-batches count equally. The coefficient weights a
mean over the step, however many micro-batches it has. (transformers' Trainer adds the auxiliary loss of every
micro-batch in full, so its weight grows with their number.)

The step announces the phases forward, loss, backward and evaluation (`qlora.runtime.phases`). A profiler shows them,
and `qlora.memory.live` assigns live bytes to them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora.data import Batch
from qlora.objective.causal_lm import CausalLM
from qlora.objective.objective import Loss, Objective
from qlora.ops.dropout import masks_by_row
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
    penalty: Callable[[], Tensor | None] | None = None,
) -> Loss:
    """Add the gradients of one optimizer step to the parameters' `.grad`.

    LoRA's dropout of a row depends only on the seed, the step and the row's number in the step.

    Args:
        model: the model, in training mode.
        batches: all micro-batches of the step.
        objective: computes the loss of a micro-batch.
        seed: seed of dropout.
        step: number of the optimizer step.
        rank: number of this process. It computes every `processes`-th micro-batch, starting at `rank`, so the sum over
            all processes is the step.
        processes: number of processes.
        penalty: computes what the adapter method adds to the loss once a step; None for nothing.

    Returns:
        This process's share of the mean loss and metrics, without the penalty; for causal language modelling, per
        supervised token. The loss includes the auxiliary loss times its coefficient, and `aux` is its mean without it.
    """
    weight = sum(map(objective.weight, batches))
    assert weight > 0, "a step has no supervised token; qlora.data must not produce such a step"
    coefficient, tokens = objective.aux_coefficient(model), sum(batch.tokens for batch in batches)
    total = _nothing(objective, next(model.parameters()).device)
    if coefficient:
        total = total._replace(aux=torch.zeros_like(total.sum))
    first_rows = itertools.accumulate((len(batch.input_ids) for batch in batches), initial=0)
    for batch, first in list(zip(batches, first_rows, strict=False))[rank::processes]:
        torch.manual_seed(fold_seed(seed, step, first))  # for dropout of the model itself
        with masks_by_row(fold_seed(seed, step), first):
            with announce(Phase.FORWARD):
                loss = _divided(objective.loss(model, batch), weight)
                if coefficient:
                    loss = _with_aux(loss, batch.tokens / tokens, coefficient)
            _add_gradients(loss.sum)
        total = _added(total, loss)
    if penalty is not None and (added := penalty()) is not None:
        _add_gradients(added / processes)  # the processes' gradients are summed
    return total


def _add_gradients(loss: Tensor) -> None:
    """Add the gradients of a scalar to the parameters' `.grad`."""
    with announce(Phase.BACKWARD):
        loss.backward()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = CAUSAL_LM,
    *,
    rank: int = 0,
    processes: int = 1,
    before_each: Callable[[], object] = lambda: None,
) -> tuple[Loss, int]:
    """Return the summed loss and metrics of this process's share of `batches`, and the weight of all batches.

    Gradients and the training mode do not change.

    Args:
        model: the model.
        batches: all batches of the evaluation.
        objective: computes the loss of a batch.
        rank: number of this process; it evaluates every `processes`-th batch, starting at `rank`.
        processes: number of processes.
        before_each: called before each batch, equally often in every process; an exception of it ends the evaluation.
    """
    total = _nothing(objective, next(model.parameters()).device)
    with evaluation_mode(model), announce(Phase.EVALUATION):
        for first in range(0, len(batches), processes):
            before_each()
            for batch in batches[first + rank : first + rank + 1]:
                total = _added(total, objective.loss(model, batch))
    return total, sum(map(objective.weight, batches))


def _nothing(objective: Objective, device: torch.device) -> Loss:
    """Return zeros, so that a process without a micro-batch contributes as many numbers as the others."""
    return Loss(
        torch.zeros((), device=device), {n: torch.zeros((), device=device) for n in objective.metrics}
    )


def _divided(loss: Loss, weight: int) -> Loss:
    return loss._replace(
        sum=loss.sum / weight, metrics={name: metric / weight for name, metric in loss.metrics.items()}
    )


def _with_aux(loss: Loss, share: float, coefficient: float) -> Loss:
    """Add a micro-batch's share of the auxiliary loss to its share of the loss."""
    assert loss.aux is not None, (
        "the objective has a coefficient for an auxiliary loss that it does not return"
    )
    return loss._replace(sum=loss.sum + coefficient * share * loss.aux, aux=share * loss.aux)


def _added(total: Loss, loss: Loss) -> Loss:
    metrics = {name: metric + loss.metrics[name] for name, metric in total.metrics.items()}
    aux = total.aux if total.aux is None or loss.aux is None else total.aux + loss.aux.detach()
    return Loss(total.sum + loss.sum.detach(), metrics, aux)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block under `model.eval()`, without dropout and checkpointing, then restore the mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
