"""The experiments: questions, each with settings under labels; and the cells that are to be run next.

A label has one or several settings, usually one setting at several learning rates. Seed 0 screens all of them, and
further rates while the best is at an end of the grid. The setting with the lowest held-out loss gets seeds 1 to 5, too,
which no choice has used, and only these seeds are reported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.methods.cell import Cell, Setting
from benchmarks.methods.ledger import Records
from benchmarks.methods.rows import LORA, NEAR, QLORA, RANK, TABLE, Row, doubled, rows, short
from benchmarks.methods.training import trains

SCREENING, SEEDS = 0, (1, 2, 3, 4, 5)
EXTENSIONS = 3
"""most learning rates that a grid gets beyond its first ones"""

RANKS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (8, 32, 128, 256)
BLOCKS = (64, 256, 1024, 4096)
WIDTHS = {"hidden": 256, "inner": 704}
"""sizes of the bundled base"""

QV = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FULL, BASE = Setting.of("full"), Setting.of("none")


@dataclass(frozen=True)
class Experiment:
    """One question."""

    name: str
    question: str
    settings: dict[str, list[Setting]] = field(hash=False)
    """label -> settings of which the best goes on"""
    neighbours: bool = False
    """the labels are the values of a grid: only the best and one on each side go on"""

    def chosen(self, records: Records) -> dict[str, Setting]:
        """Return the best setting of each label whose screening is complete, without the diverged."""
        found = {}
        for label, settings in self.settings.items():
            settings = extended(settings, records)
            losses = [_loss(records, setting) for setting in settings]
            if any(loss is None for loss in losses):
                continue
            best = min(range(len(settings)), key=lambda n: losses[n] or 0.0)
            if losses[best] != float("inf"):
                found[label] = settings[best]
        return found

    def replicated(self, records: Records) -> list[Setting]:
        """Return the settings that get all seeds; for a grid none until its screening is complete."""
        chosen = self.chosen(records)
        if not self.neighbours:
            return list(chosen.values())
        if len(chosen) < len(self.settings):
            return []
        grid = list(chosen.values())
        losses = [_loss(records, setting) or 0.0 for setting in grid]
        best = losses.index(min(losses))
        return grid[max(0, best - 1) : best + 2]


def extended(settings: list[Setting], records: Records) -> list[Setting]:
    """Return the settings with further learning rates, each twice or half the last, while the best is at an end.

    So no grid decides by its bounds. A single setting is no grid.
    """
    grid = list(settings)
    while 1 < len(grid) < len(settings) + EXTENSIONS:
        losses = [_loss(records, setting) for setting in grid]
        if any(loss is None for loss in losses):
            break
        best = min(range(len(grid)), key=lambda n: losses[n] or 0.0)
        if 0 < best < len(grid) - 1:
            break
        lr = grid[best].get("optimizer.lr")
        if best == 0:
            grid.insert(0, grid[0].but(optimizer__lr=lr / 2))
        else:
            grid.append(grid[-1].but(optimizer__lr=lr * 2))
    return grid


def _loss(records: Records, setting: Setting) -> float | None:
    """Return the held-out loss in the screening; infinity if it diverged, None if it has not run."""
    record = records.get(Cell(setting, SCREENING).key)
    if record is None:
        return None
    loss = record["loss_after"]
    return float("inf") if loss is None or loss != loss else float(loss)


def experiments() -> list[Experiment]:
    """Return all experiments, the most valuable first, with the settings that this version of the package can train."""
    table: list[Row] = rows()
    everything = {"base, untrained": [BASE]} | {row.label: row.grid for row in table}
    lora, full = _rates(LORA, doubled(5e-4, 7)), _rates(FULL, doubled(6.25e-5, 7))
    ranks = {f"r = {rank}": _near(LORA.but(adapter__rank=rank)) for rank in RANKS}
    made = [
        Experiment("methods", "Which method learns the task best?", everything),
        Experiment("lr-lora", "Which learning rate does LoRA need?", lora, neighbours=True),
        Experiment("lr-full", "Which learning rate does full fine-tuning need?", full, neighbours=True),
        Experiment("rank", "Which rank does the task need?", ranks),
        Experiment("quantization", "What does a 4-bit base cost?", _quantization()),
        Experiment("targets", "Which layers, at equal numbers of parameters?", _targets()),
        Experiment("batch", "Does LoRA tolerate large batches less?", _batches()),
        Experiment("alpha", "Which alpha?", _alphas()),
        Experiment(
            "high-rank",
            "Which scaling at r = 64, if alpha and learning rate stay those of r = 8?",
            _high_rank(),
        ),
        Experiment("init", "Which initialisation?", _initialisations()),
    ]
    return [_trainable(experiment) for experiment in made]


def _trainable(experiment: Experiment) -> Experiment:
    kept = {
        label: found
        for label, all_ in experiment.settings.items()
        if (found := [s for s in all_ if trains(s)])
    }
    return Experiment(experiment.name, experiment.question, kept, experiment.neighbours)


def _rates(setting: Setting, lrs: Sequence[float]) -> dict[str, list[Setting]]:
    return {short(lr): [setting.but(optimizer__lr=lr)] for lr in lrs}


def _near(setting: Setting, lrs: Sequence[float] = NEAR) -> list[Setting]:
    return [setting.but(optimizer__lr=lr) for lr in lrs]


def _targets() -> dict[str, list[Setting]]:
    chosen = {
        "all linears": "all-linear", "attention": "attention", "MLP": list(MLP), "q and v": list(QV),
    }  # fmt: skip
    return {
        f"{label}, r = {(rank := matched_rank(label))}": _near(
            LORA.but(adapter__targets=targets, adapter__rank=rank)
        )
        for label, targets in chosen.items()
    }


def matched_rank(label: str) -> int:
    """Return the rank at which these targets have the parameters of rank 8 on all linears, as nearly as possible."""
    hidden, inner = WIDTHS["hidden"], WIDTHS["inner"]
    attention, mlp = 4 * 2 * hidden, 3 * (hidden + inner)
    each = {"all linears": attention + mlp, "attention": attention, "MLP": mlp, "q and v": attention // 2}
    return round(RANK * (attention + mlp) / each[label])


def _alphas() -> dict[str, list[Setting]]:
    alphas = {"1": 1.0, "r/2": RANK / 2, "r": None, "2r": 2.0 * RANK, "4r": 4.0 * RANK}
    fixed = LORA.but(optimizer__lr=NEAR[1])
    found = {
        f"alpha = {name}": [fixed if alpha is None else fixed.but(adapter__alpha=alpha)]
        for name, alpha in alphas.items()
    }
    plain = fixed.but(adapter__scaling="alpha", adapter__alpha=float(RANK))
    return found | {"alpha = r, not divided by r": [plain]}


def _high_rank() -> dict[str, list[Setting]]:
    high = LORA.but(adapter__rank=RANKS[-1], adapter__alpha=float(RANK), optimizer__lr=NEAR[1])
    return {"alpha/rank": [high], "alpha/sqrt(rank)": [high.but(adapter__scaling="alpha/sqrt(rank)")]}


def _initialisations() -> dict[str, list[Setting]]:
    pissa = next(row for row in TABLE if row.label == "PiSSA")
    others = {name: _near(LORA.but(adapter__init=name)) for name in ("gaussian", "orthogonal")}
    return {"kaiming": _near(LORA), **others, "pissa": pissa.grid}


def _batches() -> dict[str, list[Setting]]:
    grids = {"full": (FULL, doubled(5e-4, 3)), "LoRA": (LORA, NEAR)}
    return {
        f"{name}, batch {batch}": [
            setting.but(training__global_batch_size=batch, optimizer__lr=lr * _scaled(batch)) for lr in lrs
        ]
        for batch in BATCHES
        for name, (setting, lrs) in grids.items()
    }


def _scaled(batch: int) -> float:
    """Return the factor of the learning rates at this batch, the square root of the batch by 16, as a power of two."""
    return {8: 1.0, 32: 1.0, 128: 2.0, 256: 4.0}[batch]


def _quantization() -> dict[str, list[Setting]]:
    lr = {"optimizer__lr": NEAR[1]}
    flat = {"base__double_quant": False}
    return {
        "16-bit": [LORA.but(**lr)],
        "NF4": [QLORA.but(**lr, **flat)],
        "FP4, simulated": [Setting(LORA.method, LORA.but(**lr).keys, "fp4-64")],
        "int4, simulated": [Setting(LORA.method, LORA.but(**lr).keys, "int4-64")],
        "NF4, double quantization": [QLORA.but(**lr)],
        **{
            f"NF4, blocks of {block}": [QLORA.but(**lr, **flat, base__block_size=block)]
            for block in BLOCKS[1:]
        },
    }


def plan(records: Records, chosen: Sequence[Experiment] | None = None) -> Iterator[tuple[str, Cell]]:
    """Yield the unfinished cells that are known now, in the order of their value, each with its experiment.

    All screening comes first. Which setting gets more seeds is known once its label's screening is complete, so the
    plan of a started table grows.
    """
    listed = chosen or experiments()
    seen: set[str] = set()

    def new(setting: Setting, seed: int) -> Cell | None:
        cell = Cell(setting, seed)
        if cell.key in seen or cell.key in records:
            return None
        seen.add(cell.key)
        return cell

    for experiment in listed:
        for settings in experiment.settings.values():
            for setting in extended(settings, records):
                if cell := new(setting, SCREENING):
                    yield experiment.name, cell
    for experiment in listed:
        going_on = experiment.replicated(records)
        for seed in SEEDS:  # seed by seed, so that a stop leaves all rows with the same seeds
            for setting in going_on:
                if cell := new(setting, seed):
                    yield experiment.name, cell


def upper_count(chosen: Sequence[Experiment] | None = None) -> tuple[int, int]:
    """Return the numbers of screening cells and of cells with more seeds, if no two experiments chose the same."""
    listed = chosen or experiments()
    screening = {
        Cell(setting, SCREENING).key
        for e in listed
        for settings in e.settings.values()
        for setting in settings
    }
    more = sum(min(3, len(e.settings)) if e.neighbours else len(e.settings) for e in listed)
    return len(screening), more * len(SEEDS)
