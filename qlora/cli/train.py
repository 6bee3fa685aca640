"""`qlora train`: run a recipe."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, Quiet, RecipeArgument, Verbose, startup_for
from qlora.errors import ModelError
from qlora.runtime.launch import is_main

if TYPE_CHECKING:
    from qlora.training.result import TrainResult

GiB = 2**30

MEANINGS = {
    "adapter": "the trained adapter",
    "model": "the trained model",
    "report.html": "the run on one page: curves, samples, memory, recipe",
    "result.json": "the summary of the run",
    "metrics.jsonl": "losses and speed of each step, evaluations and samples",
    "facts.json": "device, base, rows, steps and software of the run",
    "recipe.yaml": "the recipe with every default",
    "run.json": "the id of the run",
    "memory.json": "memory by part: forecast and measured",
    "memory.md": "the same as a table",
    "memory.png": "the same as a picture",
    "checkpoints": "checkpoints, for --resume",
    "best": "the weights with the best evaluation so far",
    "wandb": "the copy for Weights & Biases",
    "tensorboard": "the copy for TensorBoard",
}
"""everything that a run writes, in the order of interest"""


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the existing run in the folder and start again.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model with a recipe.

    The recipe's output folder gets the trained adapter, checkpoints, metrics
    and a report. An existing run is never overwritten without --fresh.
    Ctrl-C saves a checkpoint and stops; --resume continues the run.

    [bold]qlora train quickstart[/bold]
    [bold]qlora train my.yaml optimizer.lr=1e-4 training.max_steps=100[/bold]
    """
    if resume and fresh:
        raise typer.BadParameter("--resume and --fresh cannot be used together; leave one out")
    startup = startup_for(quiet=quiet, verbose=verbose, json_output=json_output)
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])  # before torch is imported: a wrong recipe fails at once
    with startup.stage(IMPORTS):
        from qlora.training.train import train as run

    outcome = run(loaded, resume=resume, fresh=fresh, terminal=startup.shown, startup=startup)
    if not is_main():
        pass  # only the main process prints
    elif json_output:
        print(json.dumps(outcome.as_json()))
    elif quiet:
        print(outcome.result or _stopped(outcome.run, outcome.steps))
    else:
        print(report(outcome))
    if isinstance(outcome.stopped_by, int):
        sys.exit(128 + outcome.stopped_by)


def report(outcome: "TrainResult") -> str:
    """Summarize a run for the user: losses, memory, time, and every file that it wrote."""
    from qlora.report.headlines import duration

    lines = []
    if outcome.result is not None and outcome.loss_before is not None:
        at = "" if outcome.result_step == outcome.steps else f", at step {outcome.result_step}"
        lines.append(f"held-out loss  {outcome.loss_before:.3f} before, {outcome.loss_after:.3f} after{at}")
    memory = outcome.memory
    if memory.allocated_bytes is not None and memory.reserved_bytes is not None:
        lines.append(
            f"memory         {memory.allocated_bytes / GiB:.2f} GiB peak allocated on the device, "
            f"{memory.reserved_bytes / GiB:.2f} GiB peak reserved"
        )
    if outcome.adapter and "summary" in outcome.adapter:
        lines.append(f"adapter        {outcome.adapter['summary']}")
    lines.append(f"host memory    {memory.resident_bytes / GiB:.2f} GiB peak resident, libraries included")
    lines.append(
        f"time           {duration(outcome.seconds)} for {outcome.steps} of {outcome.total_steps} steps"
    )
    lines.append(f"files          {outcome.run}/")
    lines += [f"  {name:15}{meaning}" for name, meaning in written(outcome.run)]
    if outcome.result is not None:
        lines.append(f'\nTry it:  qlora generate {outcome.run} --prompt "..."')
    else:
        lines.append(_stopped(outcome.run, outcome.steps))
    return "\n".join(lines)


def written(run: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, meaning) of each file and folder that a run wrote into its folder."""
    for name, meaning in MEANINGS.items():
        path = run / name
        if path.exists():
            inside = f" ({len(list(path.glob('step-*')))})" if name == "checkpoints" else ""
            yield f"{name}/" if path.is_dir() else name, meaning + inside


def _stopped(run: Path, steps: int) -> str:
    """Return the line about a run that stopped after `steps` steps, as its folder is: a last save can fail."""
    from qlora.training import checkpoint

    try:
        newest = checkpoint.newest(run, checksums=False, report=lambda line: None)
        step = None if newest is None else checkpoint.read_state(newest)["step"]
    except ModelError:
        return "stopped early; every checkpoint of the run is damaged. Start again with --fresh"
    if step is None:
        return "stopped early; no checkpoint could be saved, so --resume starts again at step 0"
    if step < steps:
        return f"stopped early after step {steps}; the newest checkpoint is of step {step}, from which --resume goes on"
    return f"stopped early; a checkpoint of step {step} is saved. Resume with --resume"
