"""Training and inference speed of every method, in turns within one process, on an otherwise idle machine.

All models are in memory at once. In every round each method takes two optimizer steps and generates answers; every
second round has the reverse order, so that a slow phase of the machine meets all of them. LoRA's layers use the fused
passes of the package; those of the other methods and the rivals do not, so a part of a difference is ours and not the
method's.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.methods.base import digest, make
from benchmarks.methods.cell import Cell
from benchmarks.methods.e2e import E2E
from benchmarks.methods.generation import greedy
from benchmarks.methods.machine import where
from benchmarks.methods.prefix_tuning import prefix_cache
from benchmarks.methods.rows import rows
from benchmarks.methods.training import session_of
from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.merge import merge_adapter
from qlora.data import Prompts
from qlora.training.session import Session
from qlora.training.train import update

FILE = Path(__file__).parents[1] / "reports/methods_speed.json"
STEPS, PROMPTS, TOKENS = 2, 16, 32


class Contender:
    """One method, ready to train and to generate."""

    def __init__(self, session: Session, data: E2E) -> None:
        self.session = session
        prompts = Prompts(session.recipe.data, session.tokenizer)
        self.prompts = [prompts.encode(mr) for mr in data.test_sample(PROMPTS)]
        self.step = 0
        self.train()  # the first step allocates
        self.merged = merged(session.model)
        self.rates: dict[str, list[float]] = {"training": [], "inference": [], "merged": []}

    def train(self) -> float:
        """Take steps; return tokens a second, without padding."""
        batches = [self.session.batches.step(self.step + n) for n in range(STEPS)]
        began = time.perf_counter()
        for step, batch in enumerate(batches, self.step):
            update(self.session, batch, step, 1e-4)
        self.step += STEPS
        return sum(part.tokens for batch in batches for part in batch) / (time.perf_counter() - began)

    def generate(self, model: nn.Module) -> float:
        """Answer the prompts without a stop; return generated tokens a second, the prompts' pass included."""
        filled = (lambda count: prefix_cache(model, count)) if hasattr(model, "prefix") else None
        began = time.perf_counter()
        greedy(model, self.prompts, (), TOKENS, filled=filled)
        return PROMPTS * TOKENS / (time.perf_counter() - began)

    def turn(self) -> None:
        """Measure each rate once."""
        self.rates["training"].append(self.train())
        self.rates["inference"].append(self.generate(self.session.model))
        if self.merged is not None:
            self.rates["merged"].append(self.generate(self.merged))


def merged(model: nn.Module) -> nn.Module | None:
    """Return a copy of the model with plain linears in place of adapted ones; None if the method cannot be merged."""
    layers = AdaptedLinear.of(model)
    if not layers or any(not (layer.changes_weight or layer.changes_bias) for layer in layers.values()):
        return None
    return merge_adapter(copy.deepcopy(model)).eval()


def main(arguments: argparse.Namespace) -> None:
    """Measure and write the file that the report reads."""
    data = E2E.read(arguments.data)
    make(data, arguments.cache)
    contenders = {}
    for row in rows():
        contenders[row.label] = Contender(session_of(Cell(row.grid[0], 0), data, arguments.cache), data)
        print(f"ready: {row.label}", file=sys.stderr, flush=True)
    in_turns(list(contenders.values()), arguments.rounds, Contender.turn)
    FILE.write_text(
        json.dumps(
            {
                "where": where(arguments.threads) | {"base": digest(arguments.cache)},
                "rounds": arguments.rounds,
                "rows": {label: contender.rates for label, contender in contenders.items()},
            },
            indent=1,
        )
        + "\n"
    )


def in_turns(contenders: list[Any], rounds: int, turn: Callable[[Any], object]) -> None:
    """Call `turn` for each contender in every round; every second round has the reverse order."""
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            turn(contender)
