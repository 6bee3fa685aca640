"""`qlora train`: run a recipe."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import Json, Overrides, RecipeArgument
from qlora.errors import ModelError

if TYPE_CHECKING:
    from qlora.training.result import TrainResult

GiB = 2**30


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
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])  # before torch is imported: a wrong recipe fails at once
    from qlora.training.train import train as run

    outcome = run(loaded, resume=resume, fresh=fresh, terminal=not json_output)
    if int(os.environ.get("RANK", "0")) > 0:
        pass  # only the main process prints
    elif json_output:
        print(json.dumps(outcome.as_json()))
    else:
        print(report(outcome))
    if outcome.stopped_by:
        sys.exit(128 + outcome.stopped_by)


def report(outcome: "TrainResult") -> str:
    """Summarize a run for the user: losses, memory, time, and where the result is."""
    lines = []
    if outcome.result is not None and outcome.loss_before is not None:
        lines.append(f"held-out loss  {outcome.loss_before:.3f} before, {outcome.loss_after:.3f} after")
    memory = outcome.memory
    if memory.allocated_bytes is not None and memory.reserved_bytes is not None:
        lines.append(
            f"memory         {memory.allocated_bytes / GiB:.2f} GiB peak allocated on the device, "
            f"{memory.reserved_bytes / GiB:.2f} GiB peak reserved"
        )
    lines.append(f"host memory    {memory.resident_bytes / GiB:.2f} GiB peak resident, libraries included")
    lines.append(f"time           {outcome.seconds:.0f} s for {outcome.steps} of {outcome.total_steps} steps")
    lines.append(f"run            {outcome.run}  (metrics.jsonl, recipe.yaml)")
    if outcome.result is not None:
        lines.append(f"result         {outcome.result}")
        lines.append(f'\nTry it:  qlora generate {outcome.run} --prompt "..."')
    else:
        lines.append(_stopped(outcome.run))
    return "\n".join(lines)


def _stopped(run: Path) -> str:
    """Return the line about a stopped run. Read the folder, because the last checkpoint could fail (a full disk)."""
    from qlora.training import checkpoint

    try:
        newest = checkpoint.newest(run, checksums=False, report=lambda line: None)
        step = None if newest is None else checkpoint.read_state(newest)["step"]
    except ModelError:
        return "stopped early; every checkpoint of the run is damaged. Start again with --fresh"
    if step is None:
        return "stopped early; no checkpoint could be saved, so --resume starts again at step 0"
    return f"stopped early; a checkpoint of step {step} is saved. Resume with --resume"
