"""Check of a recipe before it runs: its rows, steps and memory, and what could not be checked."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora.data import Dataset, load_dataset, training_batches
from qlora.errors import ModelError, RecipeError
from qlora.memory.architecture import architecture
from qlora.memory.estimate import from_config_alone, hub_sources
from qlora.memory.forecast import forecast
from qlora.memory.no_forecast import NoForecastError, failure_named
from qlora.memory.plan import changed
from qlora.memory.run_memory import RunMemory, budgeted
from qlora.memory.workload import assumed
from qlora.model.checkpoint_notes import checkpoint_notes
from qlora.model.config_notes import config_notes
from qlora.model.gpu_notes import gpu_notes
from qlora.model.load import load_config, load_tokenizer
from qlora.model.prepare import check_continued
from qlora.model.progress import is_on_hub
from qlora.model.tokens import TrainedTokens
from qlora.quantization.transformers_loader import overruled_settings
from qlora.recipe import Recipe
from qlora.recipe.sizes import unit_for
from qlora.report.facts import DataFacts, DeviceFacts, MemoryFacts, Row, StepFacts
from qlora.runtime.device import device_of
from qlora.storage.safetensors_files import find_checkpoint
from qlora.tracking.startup import Startup, silent
from qlora.tracking.wandb_names import check_names
from qlora.training.advice import Advice, advise
from qlora.training.facts import data_facts, device_facts, memory_facts, step_facts
from qlora.training.prepare import check_warmup
from qlora.training.run_folder import check_output

LARGE_BYTES = 16 * 2**20
"""size of a data file from which on only its first rows are read"""

FIRST_ROWS = 200
"""rows of a large data file that are read"""


@dataclass
class Checked:
    """Result of a check that found nothing wrong."""

    device: DeviceFacts
    data: DataFacts | None = None
    """None if the rows could not be read"""
    steps: StepFacts | None = None
    """None if not all rows were read"""
    memory: MemoryFacts | None = None
    advice: Advice | None = None
    """None if not all rows were read, or the architecture cannot be forecast"""
    precision: str = ""
    """the base's linear weights that are in 4 bits; empty without quantization or forecast"""
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """what could not be checked, and why"""

    def verdict(self) -> str:
        """Return the result in one line: `OK: 54 rows, 14 steps an epoch, 9.1 GiB`."""
        parts = []
        if self.data is not None:
            first = "" if self.steps else "the first "
            parts.append(f"{first}{self.data.counts['train'] + self.data.counts['held_out']:,} rows")
        if self.steps is not None:
            count = self.steps.steps_per_epoch
            parts.append(f"{count:,} {'step' if count == 1 else 'steps'} an epoch")
        if self.memory is not None and (size := self.memory.forecast_bytes) is not None:
            parts.append(unit_for(size).text(size))
        return "OK: " + ", ".join(parts or ["the recipe is valid"])

    def rows(self) -> list[Row]:
        """Return what was found, in the words of the header of a run."""
        parts = [
            part
            for part in (self.device, self.data, self.steps, self.memory, self.advice)
            if part is not None
        ]
        rows = [row for part in parts for row in part.rows()]
        if self.precision:
            rows.insert(1, ("base", self.precision))
        return [
            *rows,
            *(("note", note) for note in self.notes),
            *(("not checked", reason) for reason in self.unchecked),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"ok": True, "verdict": self.verdict(), **asdict(self)}


def check(recipe: Recipe, startup: Startup | None = None) -> Checked:
    """Read the base's config and tokenizer and the rows, and forecast the memory on this machine. Writes nothing.

    The weights are neither read nor downloaded.

    Args:
        recipe: the recipe.
        startup: shows the stages; None shows nothing.

    Raises:
        QloraError: what is wrong; a run would raise the same.

    >>> check(Recipe.load("quickstart")).verdict()
    'OK: 1,650 rows, 188 steps an epoch, 29.7 MiB'
    """
    startup = startup or silent()
    device = device_of(recipe)
    cuda = device.type == "cuda"
    found = Checked(device_facts(device), notes=_output_notes(recipe))
    with startup.stage("reading the base's config"):
        recipe = _readable(recipe, found)
        with suppress(ModelError):  # what a base lacks is found below
            config = load_config(recipe.base)
            found.notes += [
                *overruled_settings(recipe.base, config),
                *config_notes(recipe, config),
                *checkpoint_notes(recipe.base, config),
                *gpu_notes(recipe, config, device),
            ]
    with startup.stage("reading the data"):
        tokens = TrainedTokens.of(recipe)
        found.notes += check_continued(recipe, tokens.tokenizer)
        if recipe.adapter.start_from is not None and recipe.base.init != "pretrained":
            found.unchecked.append(
                "adapter.from: whether the adapter was trained on this base, whose weights are not here"
            )
        dataset, whole = _rows(recipe, tokens, found)
    if dataset is None:
        with startup.stage("forecasting memory"):
            found.memory = _assumed_memory(recipe, cuda)
        return found
    found.data = data_facts(recipe, dataset)
    if recipe.training.memory is not None:
        with startup.stage("planning memory") as progress:
            choice = budgeted(recipe, dataset, device, progress)
        found.notes.append(choice.why)
        recipe = changed(recipe, memory=None, **choice.settings)
    batches = training_batches(dataset, recipe)
    steps = recipe.training.total_steps(batches.steps_per_epoch)
    if whole:
        check_warmup(recipe, steps)
        found.steps = step_facts(recipe, batches)
    with startup.stage("forecasting memory"):
        memory = RunMemory.of(recipe, dataset, batches, steps, device)
    found.memory = memory_facts(memory)
    if whole and (made := memory.forecast) is not None:
        trained = made.trained_parameters, made.adapter_parameters
        found.advice = advise(recipe, dataset.counts.supervised, made.parameters, *trained)
    if memory.precision is not None and recipe.base.quantization == "nf4":
        found.precision = memory.precision.line()
    return found


def _output_notes(recipe: Recipe) -> list[str]:
    """Return notes on the run's folder, its trackers and its functions.

    Raises:
        RecipeError: W&B would refuse a name.
    """
    notes = check_names(recipe.tracking.wandb, Path(recipe.output))
    try:
        check_output(recipe, Path(recipe.output), resume=False, fresh=False)
    except RecipeError as error:
        notes.append(str(error))
    follows = recipe.training.follows
    return notes if follows.always_computed else [*notes, f"training.best_by: {follows.needs}"]


def _readable(recipe: Recipe, found: Checked) -> Recipe:
    """Return the recipe with the package's config for a hub model that is not here; note what stays unchecked."""
    base = recipe.base
    if base.init != "pretrained":
        return recipe
    if not is_on_hub(base):
        folder = find_checkpoint(base.model)
        if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            found.unchecked.append(f"the weights: {folder} has none, and a run needs them")
        return recipe
    try:
        find_checkpoint(base.model, base.revision)
    except ModelError:
        found.unchecked.append(f"the weights of {base.model}: they are not on this machine yet")
    else:
        return recipe
    try:
        load_tokenizer(base)
    except ModelError:
        known = from_config_alone(recipe)
        if known is recipe:
            raise
        found.unchecked.append(
            f"the tokenizer of {base.model}: it is not on this machine, so lengths are those of the package's own"
        )
        return known.model_copy(update={"base": known.base.model_copy(update={"init": "synthetic"})})
    return recipe


def _assumed_memory(recipe: Recipe, cuda: bool) -> MemoryFacts:
    """Forecast the memory with full rows, or say why that is impossible."""
    try:
        with failure_named(recipe.base.model):
            made = forecast(recipe, assumed(recipe), architecture(recipe, cuda=cuda), cuda=cuda)
    except NoForecastError as error:
        return MemoryFacts(None, str(error))
    size = made.total_bytes
    return MemoryFacts(
        size, f"{unit_for(size).text(size)} forecast, if every row has {recipe.data.max_length:,} tokens"
    )


def _rows(recipe: Recipe, tokens: TrainedTokens, found: Checked) -> tuple[Dataset | None, bool]:
    """Load the rows, or the first of a large file. Returns None if they are on the hub, and True if all were read."""
    section = recipe.data
    if hub := hub_sources(recipe):
        found.unchecked.append(
            f"the rows: {', '.join(hub)} is not a local file; `qlora data` downloads and reads it"
        )
        return None, False
    file = None if section.source is None else Path(section.source)
    large = file is not None and file.is_file() and file.stat().st_size > LARGE_BYTES
    whole = not large or section.limit is not None
    if not whole:
        found.unchecked.append(f"the rows after the first {FIRST_ROWS} of {file}")
        held_out = section.held_out if isinstance(section.held_out, str) else min(section.held_out, 1)
        section = section.model_copy(update={"limit": FIRST_ROWS, "held_out": held_out})
    dataset = load_dataset(section, tokens.tokenizer, recipe.training.seed)
    if whole:
        tokens.check_rows(dataset.train)
    return dataset, whole
