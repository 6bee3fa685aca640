"""Functions of the caller: metrics of the held-out rows at each evaluation, and a call after each step.

Only the main process calls them. They do not disturb the training: random numbers and the mode of every module are
afterwards as they were before. A function that fails ends the run as a signal does: with a checkpoint, from which the
run resumes once the function is mended.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora.data import Prompts
from qlora.errors import FunctionError, RecipeError, UsageError, first_line, listed
from qlora.inference.generate import answer
from qlora.recipe import Recipe
from qlora.recipe.following import METRIC_NAME
from qlora.runtime.distributed import DataParallel
from qlora.runtime.seeds import fold_seed
from qlora.runtime.signals import EvaluationStopped

RESERVED = ("loss", "tokens")
"""numbers that every evaluation has already: eval_loss and eval_tokens"""


@dataclass(frozen=True)
class HeldOutExample:
    """A held-out row."""

    prompt: str
    """the question, without the template around it"""
    reference: str
    """the answer in the data"""
    before: str
    """the messages before the question, shortened"""
    origin: str
    """its place in the data, such as file:line"""
    input_ids: tuple[int, ...]
    """the whole prompt in tokens, with the messages before it and the template"""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows and the present model, for a metric.

    Examples:
        >>> def exact_match(held_out):
        ...     rows = held_out.examples[:50]
        ...     right = sum(held_out.answer(row) == row.reference.strip() for row in rows)
        ...     return {"exact_match": right / len(rows)}
        >>> qlora.train(recipe, metrics=exact_match)
    """

    step: int
    """optimizer steps that the model has taken"""
    loss: float
    """held-out loss of the model, in nats per supervised token"""
    examples: Sequence[HeldOutExample]
    """all held-out rows, in the same order at every evaluation"""
    model: nn.Module
    """the model with its adapter, in evaluation mode; its weights must not be changed"""
    tokenizer: Any
    """a copy of the model's tokenizer; changes to it do not reach the run"""
    prompts: Callable[[], Prompts] = field(repr=False)
    """makes the encoder of new questions"""
    stop_ids: frozenset[int] = field(repr=False)
    """tokens that end an answer"""
    stopped: Callable[[], bool] = field(repr=False)
    """returns True if a signal has come"""
    _given: dict[tuple[tuple[int, ...], int], str] = field(default_factory=dict, repr=False)

    def answer(
        self, question: HeldOutExample | str, max_new_tokens: int = 64, *, temperature: float = 0.0
    ) -> str:
        """Generate the present model's answer to a held-out row or to a new question.

        A greedy answer (temperature 0) that another function has asked for is not generated again. Above 0, the random
        numbers depend only on the seed of the recipe and the step, so that a resumed run gets the same answers.

        Args:
            question: one of `examples`, or a text, which is asked in the layout of the training rows.
            max_new_tokens: maximum length of the answer in tokens.
            temperature: 0 is greedy; above 0, tokens are sampled.

        Returns:
            The answer without special tokens and surrounding white space.

        Raises:
            EvaluationStopped: a signal came. Let it pass: the run saves a checkpoint and stops.
        """
        encoded = self.prompts().encode(question) if isinstance(question, str) else question.input_ids
        key = tuple(encoded), max_new_tokens
        if temperature == 0 and key in self._given:
            return self._given[key]
        if self.stopped():
            raise EvaluationStopped
        text = answer(
            self.model, self.tokenizer, encoded, max_new_tokens, stop_ids=self.stop_ids, temperature=temperature,
            stopped=self.stopped,
        )  # fmt: skip
        if self.stopped():
            raise EvaluationStopped
        if temperature == 0:
            self._given[key] = text
        return text


Metric = Callable[[HeldOut], Mapping[str, float]]
"""computes named numbers of the held-out rows"""

OnStep = Callable[[Mapping[str, Any]], bool | None]
"""receives the record of a step; returns True to stop the run"""


class Functions:
    """The functions that the caller of `train` gave.

    Args:
        metrics: a function or several.
        on_step: a function, or None.

    Raises:
        UsageError: one of them cannot be called.
    """

    def __init__(
        self, metrics: Metric | Sequence[Metric] | None = None, on_step: OnStep | None = None
    ) -> None:
        given = [] if metrics is None else [metrics] if callable(metrics) else metrics
        if isinstance(given, str | Mapping) or not all(map(callable, given)):
            raise UsageError(
                f"metrics: {_shown(metrics)} is no function. Give a function or a list of functions, each of which "
                "takes a HeldOut and returns numbers by name"
            )
        if on_step is not None and not callable(on_step):
            raise UsageError(
                f"on_step: {_shown(on_step)} is no function. Give one that takes the record of a step"
            )
        self.metrics, self._on_step = list(given), on_step
        self._asked = False
        self.failure: FunctionError | None = None
        """error of a function that failed, which ends the run"""

    @property
    def end_run(self) -> bool:
        """True if `on_step` asked for the end of the run, or a function failed."""
        return self._asked or self.failure is not None

    def check(self, recipe: Recipe, known: Sequence[str] = ()) -> None:
        """Check that there is a function for the number that `training.best_by` names.

        Only the main process checks: the callers of the others may leave the functions out.

        Args:
            recipe: the recipe.
            known: metrics of the objective, which need no function.

        Raises:
            RecipeError: there is none, or there are functions and no held-out rows.
        """
        if self.metrics and recipe.data.held_out == 0:
            raise RecipeError(
                "metrics: data.held_out is 0, so there are no rows for them. Hold rows out, or leave metrics out"
            )
        recipe.training.follows.check(bool(self.metrics), known)

    def without(self, metrics: Mapping[str, float], known: Sequence[str]) -> str | None:
        """Return a note if a run that had these metrics continues without any function; else None."""
        lost = [name for name in metrics if name not in known]
        if self.metrics or not lost:
            return None
        return f"this run had functions for {listed(lost)}, and continues without: pass them as metrics=..."

    @contextmanager
    def failure_kept(self) -> Iterator[None]:
        """Keep the error of a function that fails in the block in `failure`, which ends the run."""
        try:
            yield
        except FunctionError as error:
            self.failure = error

    def raise_failure(self, processes: DataParallel) -> None:
        """Raise the error of a function that failed, on every process."""

        def find() -> None:
            if self.failure is not None:
                raise self.failure

        processes.from_main(find)

    def after_step(self, record: Mapping[str, Any]) -> None:
        """Pass the record of a step to `on_step`; an error is kept in `failure`."""
        if self._on_step is None:
            return
        try:
            asked: object = self._on_step(MappingProxyType(dict(record)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises, the run must save a checkpoint
            self.failure = _failed("on_step", self._on_step, error, record["step"])
            return
        if asked is None or isinstance(asked, bool | np.bool_):
            self._asked = self._asked or bool(asked)
        else:
            self.failure = _wrong(
                "on_step", self._on_step, record["step"],
                f"returned {_shown(asked)}; it must return True to stop the run, or False or None to continue",
            )  # fmt: skip

    def evaluate(self, held_out: HeldOut, known: Sequence[str], seed: int) -> dict[str, float]:
        """Call every metric, and return all their numbers by name.

        Args:
            held_out: what they receive.
            known: metrics of the objective, whose names are taken.
            seed: seed of the random numbers that they draw.

        Raises:
            FunctionError: a function failed or returned something else than finite numbers by name.
            EvaluationStopped: a signal came.
        """
        found: dict[str, float] = {}
        for number, metric in enumerate(self.metrics):
            with undisturbed(held_out.model, fold_seed(seed, held_out.step, number)):
                try:
                    numbers = metric(held_out)
                except EvaluationStopped:
                    raise
                except (Exception, SystemExit) as error:
                    raise _failed("metrics", metric, error, held_out.step) from error
            if (problem := _problem(numbers, [*RESERVED, *known, *found])) is not None:
                raise _wrong("metrics", metric, held_out.step, problem)
            found |= {name: float(value) for name, value in numbers.items()}
        return found


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients and with random numbers of this seed; then restore all."""
    modes = [(module, module.training) for module in model.modules()]
    before = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(before[0])
            np.random.set_state(before[1])


def _problem(numbers: object, taken: Sequence[str]) -> str | None:
    """Say why a metric's return value cannot be recorded; None if it can."""
    if not isinstance(numbers, Mapping):
        return f'returned {_shown(numbers)}; it must return numbers by name, such as {{"exact_match": 0.5}}'
    for name, value in numbers.items():
        if not (isinstance(name, str) and METRIC_NAME.fullmatch(name)):
            return (
                f"returned a number with the name {_shown(name)}; a name begins with a letter and has only letters, "
                "digits and any of _ . / -"
            )
        if name in taken:
            return f"returned {name}, which the evaluation has already; choose another name"
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):
            return f"returned {_shown(value)} for {name}; it must be a number"
        if not math.isfinite(value):
            return f"returned {float(value)} for {name}; it must be a finite number"
    return None


def _failed(argument: str, function: object, error: BaseException, step: int) -> FunctionError:
    """Return the error for a function that raised one."""
    wrong = _wrong(argument, function, step, f"failed with {type(error).__name__}: {first_line(error)}")
    wrong.__cause__ = error
    return wrong


def _wrong(argument: str, function: object, step: int, problem: str) -> FunctionError:
    """Return the error for a function that did something wrong."""
    return FunctionError(
        f"{argument}: {_named(function)} {problem}. The run stopped at step {step} and is saved; mend the function, "
        "and continue with resume=True"
    )


def _named(function: object) -> str:
    """Return a function's name, with the place of its code if it has one: `exact_match (metrics.py:12)`."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _shown(value: object) -> str:
    """Return a value and its type, short enough for a message."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:80] + ' …'} ({type(value).__name__})"
