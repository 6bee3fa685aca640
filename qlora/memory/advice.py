"""Advice on a recipe and a GPU: the largest batches that fit, or the smallest changes that make the run fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.adapter.lora_spec import SCALINGS
from qlora.memory.architecture import Architecture, architecture
from qlora.memory.forecast import Forecaster
from qlora.memory.plan import SMALL_LOSS_CHUNK, changed, needed, sized
from qlora.memory.workload import Workload, resized
from qlora.model.prepare import checkpointed
from qlora.recipe import Recipe

SMALLEST_RANK = 8
SHORTEST_ROW = 128
MOST_FORECASTS = 12
"""in one search, in addition to those of its two ends"""
LARGEST_ROWS, LARGEST_TOKENS = 1024, 131_072


@dataclass(frozen=True)
class Change:
    """Command-line overrides of a recipe, and the memory that the run then needs."""

    settings: tuple[str, ...]
    needed_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the change as plain values."""
        return {"settings": list(self.settings), "needed_bytes": self.needed_bytes}


@dataclass(frozen=True)
class Advisor:
    """Advice on one recipe and a device with `capacity_bytes`."""

    recipe: Recipe
    workload: Workload
    forecaster: Forecaster
    """for the recipe's architecture"""
    capacity_bytes: int

    def changes(self) -> list[Change]:
        """Return the changes that make the run fit, each sufficient alone, the cheapest first.

        If no single change that only costs time is enough, several are combined into one. Empty if nothing is enough.
        """
        cheap, dear = (self._alone(steps) for steps in (_COST_TIME, _CHANGE_WHAT_IS_LEARNED))
        if cheap:
            return cheap + dear
        return self._together(_COST_TIME if dear else _COST_TIME + _CHANGE_WHAT_IS_LEARNED) + dear

    def _alone(self, steps: Sequence["Step"]) -> list[Change]:
        """Return, for each step, its smallest change that alone makes the run fit."""
        changes = []
        for step in steps:
            for recipe, setting in step(self.recipe, self.forecaster.arch):
                if (size := self._needed(recipe)) <= self.capacity_bytes:
                    changes.append(Change((setting,), size))
                    break
        return changes

    def _together(self, steps: Sequence["Step"]) -> list[Change]:
        """Combine steps in order, each with its largest change, until the run fits; return one change or none."""
        together, settings = self.recipe, tuple[str, ...]()
        for step in steps:
            for recipe, setting in list(step(together, self.forecaster.arch))[-1:]:
                together, settings = recipe, (*settings, setting)
                if (size := self._needed(together)) <= self.capacity_bytes:
                    return [Change(settings, size)]
        return []

    def largest_micro_batch(self) -> int:
        """Return the most rows of a micro-batch that fit, at the current row length."""
        rows, tokens = self.workload.train.input_ids.shape
        return self._most(lambda rows: resized(self.workload, rows=rows, tokens=tokens), rows, LARGEST_ROWS)

    def longest_rows(self, micro_batch: int | None = None) -> int:
        """Return the longest row that fits, in tokens, with the recipe's micro-batch size; a multiple of 64.

        micro_batch: rows that fit at the current length, if known: about as many tokens fit in longer rows.
        """
        rows, tokens = self.workload.train.input_ids.shape
        config = self.forecaster.arch.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or LARGEST_TOKENS
        return 64 * self._most(
            lambda blocks: resized(self.workload, rows=rows, tokens=64 * blocks),
            max(1, tokens // 64),
            max(1, min(limit, LARGEST_TOKENS) // 64),
            None if micro_batch is None else micro_batch * tokens // rows // 64,
        )

    def _most(self, load: Callable[[int], Workload], fits: int, limit: int, guess: int | None = None) -> int:
        """Return about the largest number up to `limit` whose load fits; `fits` is a number whose load does."""
        return about_largest(
            lambda number: needed(self.forecaster.forecast(self.recipe, load(number))),
            self.capacity_bytes, fits, limit, guess,
        )  # fmt: skip

    def _needed(self, recipe: Recipe) -> int:
        forecaster, cuda = self.forecaster, self.forecaster.cuda
        if recipe.adapter != self.recipe.adapter:
            forecaster = Forecaster(architecture(recipe, cuda=cuda, config=forecaster.arch.config), cuda=cuda)
        return needed(forecaster.forecast(recipe, sized(recipe, self.workload)))


def about_largest(
    size: Callable[[int], int], bound: int, fits: int, limit: int, guess: int | None = None
) -> int:
    """Return a number from `fits` to `limit` with `size(number) <= bound`, rarely over 2% below the largest.

    `size` grows with its argument, but not evenly: beyond some length a step computes in pieces. A straight line
    through two points predicts the answer. The next number is 1% above the prediction until one number is known not
    to fit, and 1% below it from then on, so that two numbers usually enclose the answer. Where the line misleads, the
    interval is halved. The search begins at `guess`, or at twice `fits`.
    """
    low, low_size = fits, size(fits)
    high, high_size = limit + 1, 0  # the smallest number known not to fit, if it is at most `limit`
    number, sides = min(max(guess or 2 * fits, fits + 1), limit), [False, True]
    for _ in range(MOST_FORECASTS):
        if high - low <= max(1, low // 50):
            break
        found = size(number)
        sides.append(found <= bound)
        slope = (found - low_size) / (number - low)
        if found <= bound:
            low, low_size = number, found
        else:
            high, high_size = number, found
        if high <= limit:
            slope = (high_size - low_size) / (high - low)
        predicted = low + int((bound - low_size) / max(1.0, slope))
        number = int(predicted * (1.01 if high > limit else 0.99))
        if high <= limit and sides[-1] == sides[-2] == sides[-3]:
            number = (low + high) // 2
        number = min(max(number, low + 1), high - 1)
    if low < limit < high and size(limit) <= bound:
        return limit
    return low


Steps = Iterator[tuple[Recipe, str]]
Step = Callable[[Recipe, Architecture], Steps]


def _micro_batch(recipe: Recipe, _: Architecture) -> Steps:
    size, total = recipe.training.micro_batch_size, recipe.training.global_batch_size
    for rows in (rows for rows in range(size - 1, 0, -1) if total % rows == 0):
        yield changed(recipe, micro_batch_size=rows), f"training.micro_batch_size={rows}"


def _checkpointing(recipe: Recipe, arch: Architecture) -> Steps:
    key = "activation_checkpointing"
    whole, mlps = checkpointed(recipe, arch.layers)
    _, mlp_alone = arch.recomputed
    if mlp_alone is not None and whole + mlps < arch.layers:
        others = arch.layers - whole
        if whole:
            yield changed(recipe, **{key: {"full": whole, "mlp": others}}), f"training.{key}.mlp={others}"
        else:
            yield changed(recipe, **{key: "mlp"}), f"training.{key}=mlp"
    if whole < arch.layers:
        yield changed(recipe, **{key: "full"}), f"training.{key}=full"


def _offload(recipe: Recipe, arch: Architecture) -> Steps:
    if checkpointed(recipe, arch.layers)[0] and not recipe.training.activation_offloading:
        yield changed(recipe, activation_offloading=True), "training.activation_offloading=true"


def _embedding(recipe: Recipe, arch: Architecture) -> Steps:
    if recipe.base.embedding == "device" and recipe.adapter.facts.frozen_base and arch.embedding_is_untied:
        base = recipe.base.model_copy(update={"embedding": "host"})
        yield recipe.model_copy(update={"base": base}), "base.embedding=host"


def _loss_chunk(recipe: Recipe, arch: Architecture) -> Steps:
    if arch.loss_chunk(recipe) > SMALL_LOSS_CHUNK:
        yield changed(recipe, loss_chunk=SMALL_LOSS_CHUNK), f"training.loss_chunk={SMALL_LOSS_CHUNK}"


def _optimizer(recipe: Recipe, _: Architecture) -> Steps:
    rule = "lion" if "lion" in recipe.optimizer.name else "adamw"
    names = [f"paged_{rule}_32bit", f"paged_{rule}_8bit"]
    if recipe.optimizer.name not in names:
        optimizer = recipe.optimizer.model_copy(update={"name": names[0]})
        yield recipe.model_copy(update={"optimizer": optimizer}), f"optimizer.name={names[0]}"


def _rank(recipe: Recipe, _: Architecture) -> Steps:
    rank = recipe.adapter.rank
    while "rank" not in recipe.adapter.unused and (rank := rank // 2) >= SMALLEST_RANK:
        # keep the scaling, so that the learning rate stays right
        scale, alpha = SCALINGS[recipe.adapter.scaling], recipe.adapter.alpha
        if alpha is not None:
            alpha *= scale(1, recipe.adapter.rank) / scale(1, rank)
        budget = recipe.adapter.budget_at(rank)
        adapter = recipe.adapter.model_copy(update={"rank": rank, "alpha": alpha, "budget": budget})
        setting = f"adapter.rank={rank}" + (
            "" if alpha == recipe.adapter.alpha else f" adapter.alpha={alpha:g}"
        )
        if budget.initial_rank is not None:
            setting += f" adapter.budget.initial_rank={budget.initial_rank}"
        yield recipe.model_copy(update={"adapter": adapter}), setting


def _length(recipe: Recipe, _: Architecture) -> Steps:
    length = recipe.data.max_length
    while (length := length // 2) >= SHORTEST_ROW:
        data = recipe.data.model_copy(update={"max_length": length})
        yield recipe.model_copy(update={"data": data}), f"data.max_length={length}"


_COST_TIME: tuple[Step, ...] = (_micro_batch, _checkpointing, _offload, _embedding, _loss_chunk, _optimizer)
_CHANGE_WHAT_IS_LEARNED: tuple[Step, ...] = (_rank, _length)
