"""`qlora eval`: loss of a fine-tuned model or of its base on held-out or other rows, and tasks of a harness."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora.cli.arguments import IMPORTS, AnyBase, Device, Json, TrustRemoteCode, show_device, startup_for
from qlora.cli.keys_as_options import keys_as_options, with_options
from qlora.cli.tables import show

if TYPE_CHECKING:
    from qlora.inference.harness import Score, Settings
    from qlora.inference.load import Trained
    from qlora.inference.other_rows import OtherRows
    from qlora.tracking.startup import Startup

Loader = Callable[[bool], "Trained"]
"""loads the model, with its adapter or without"""

OF_ROWS = "Rows"
OF_TASKS = "Tasks of lm-evaluation-harness (pip install 'qlora-train\\[eval]')"

Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        rich_help_panel=OF_ROWS,
        help="Compute the loss on all rows of another source: a file, a folder, a pattern, - or a hub set.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        rich_help_panel=OF_ROWS,
        help="Format of these rows. Default: the recipe's data.format.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="FIELD=COLUMN",
        rich_help_panel=OF_ROWS,
        help="Column of a field of the format, as in data.columns; can be repeated.",
    ),
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=OF_ROWS, help="Split of a hub data set.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS", rich_help_panel=OF_ROWS, help="Longest row. Default: the recipe's data.max_length."
    ),
]
OnBadRow = Annotated[
    str | None,
    typer.Option(
        metavar="error|skip",
        rich_help_panel=OF_ROWS,
        help="Handling of unusable rows. Default: the recipe's data.on_bad_row.",
    ),
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME,...", rich_help_panel=OF_TASKS, help="Tasks to evaluate on.")
]
TaskPath = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=OF_TASKS,
        help="Folder of own tasks: YAML files and data. It can contain Python code that is run.",
    ),
]
Shots = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, rich_help_panel=OF_TASKS, help="Examples in a question.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=OF_TASKS, help="Number of rows of each task; for trials.")
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template", rich_help_panel=OF_TASKS, help="Ask with the chat template of the training rows."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=OF_TASKS, help="Rows at once. Default: training.micro_batch_size."),
]


def evaluate(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
    ],
    base_only: Annotated[bool, typer.Option("--base", help="Evaluate the base without the adapter.")] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Evaluate the base too, beside the fine-tuned model.")
    ] = False,
    data: Source = None,
    row_format: Format = None,
    column: Columns = None,
    split: Split = None,
    max_length: MaxLength = None,
    on_bad_row: OnBadRow = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    num_fewshot: Shots = None,
    limit: Limit = None,
    chat_template: ChatTemplate = False,
    batch_size: BatchSize = None,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Compute the loss on held-out rows, or evaluate on tasks.

    The rows are the held-out rows of the run's recipe, or all rows of --data.
    The loss is the mean in nats per supervised token.

    [bold]qlora eval runs/quickstart[/bold]
    [bold]qlora eval runs/quickstart --data other.jsonl --with-base[/bold]
    [bold]qlora eval runs/quickstart --tasks hellaswag,arc_easy --limit 100[/bold]
    """
    changes = {"format": row_format, "columns": _columns(column), "split": split, "max_length": max_length}
    changes = {
        key: value for key, value in {**changes, "on_bad_row": on_bad_row}.items() if value is not None
    }
    asked = (task_path, num_fewshot, limit, chat_template or None, batch_size)
    _check_options(base_only and with_base, data, changes, tasks, any(value is not None for value in asked))
    startup = startup_for(json_output=json_output)
    trust = {"any_base": any_base, "trust_remote_code": trust_remote_code}
    load = _loader(startup, adapter, device, trust)
    models = {"base" if base_only else "adapter": not base_only, **({"base": False} if with_base else {})}
    if tasks is not None:
        from qlora.inference.harness import Settings

        names = tuple(dict.fromkeys(filter(None, map(str.strip, tasks.split(",")))))
        settings = Settings(names, task_path, num_fewshot, limit, chat_template, batch_size)
        _evaluate_tasks(load, models, settings, startup, device, json_output)
    else:
        _evaluate_rows(load, models, data, changes, startup, device, json_output)


def _loader(startup: "Startup", folder: str, device: str, trust: dict[str, bool]) -> Loader:
    """Return a function that loads the model with its adapter or without."""

    def load(with_adapter: bool) -> "Trained":
        from qlora.inference.load import load_trained

        with startup.stage("loading base and adapter" if with_adapter else "loading the base"):
            return load_trained(folder, device=device, with_adapter=with_adapter, **trust)

    return load


def _columns(given: list[str] | None) -> dict[str, str] | None:
    """Return the columns by field. Raises BadParameter for a text that is not FIELD=COLUMN."""
    columns = {}
    for text in given or ():
        field, equals, name = text.partition("=")
        if not (field and equals and name):
            raise typer.BadParameter(f"--column {text!r} is not FIELD=COLUMN; write it like prompt=question")
        columns[field] = name
    return columns or None


def _check_options(
    both: bool, data: str | None, changes: dict[str, Any], tasks: str | None, of_tasks: bool
) -> None:
    """Raise BadParameter for options that cannot be used together, or that have no effect."""
    if both:
        raise typer.BadParameter("--base and --with-base cannot be used together; leave one out")
    if data is not None and tasks is not None:
        raise typer.BadParameter("--data and --tasks cannot be used together; run the command twice")
    if changes and data is None:
        raise typer.BadParameter(
            "--format, --column, --split, --max-length and --on-bad-row are for the rows of --data; add it"
        )
    if of_tasks and tasks is None:
        raise typer.BadParameter(
            "--task-path, --num-fewshot, --limit, --chat-template and --batch-size are for --tasks; add it"
        )


def _evaluate_rows(
    load: Loader,
    models: dict[str, bool],
    data: str | None,
    changes: dict[str, Any],
    startup: "Startup",
    device: str,
    json_output: bool,
) -> None:
    """Print the losses of the models on the recipe's held-out rows, or on all rows of another source."""
    with startup.stage(IMPORTS):
        from qlora.inference.load import held_out_loss, loss_on
        from qlora.inference.other_rows import read_other_rows
        from qlora.kernels import compiled_for
    show_device(startup, device)
    rows, losses, shown = None, {}, "the standard input" if data == "-" else data
    for name, with_adapter in models.items():
        trained = load(with_adapter)
        if data is not None and rows is None:
            with startup.stage(f"reading {shown}"), keys_as_options():
                rows = read_other_rows(trained, data, changes)
        compiling = "compiling kernels, " if compiled_for(trained.model.device) else ""
        with startup.stage(
            f"{compiling}computing the loss on the {'held-out rows' if rows is None else 'rows'}"
        ):
            if rows is None:
                losses[name] = held_out_loss(trained)
            else:
                recipe = trained.recipe.model_copy(update={"data": rows.section})
                losses[name] = loss_on(trained, rows.dataset, recipe)
        del trained  # before the next model is loaded
    about = None if rows is None else rows.about()
    if json_output:
        print(json.dumps({**_losses_as_json(losses), **({} if about is None else about)}))
        return
    for note in () if rows is None else _notes(rows):
        startup.warn(note)
    _print_losses(
        losses, "held-out loss" if about is None else f"loss on the {about['rows']:,} rows of {shown}"
    )


def _notes(rows: "OtherRows") -> Iterator[str]:
    """Yield what the user must know about the rows: those that are left out or cut, and those of the training."""
    from qlora.report.facts import left_out

    counts = rows.dataset.counts
    yield from map(with_options, left_out(asdict(counts), rows.section.max_length))
    if rows.seen:
        yield (
            f"{rows.seen:,} of {counts.train:,} rows are training rows of this run, token by token, so the loss is not "
            "one on new text"
        )


def _losses_as_json(losses: dict[str, tuple[float, int]]) -> dict[str, Any]:
    plain = {name: {"eval_loss": loss, "eval_tokens": tokens} for name, (loss, tokens) in losses.items()}
    first, *others = plain
    return {**plain[first], **{name: plain[name] for name in others}}


def _print_losses(losses: dict[str, tuple[float, int]], what: str) -> None:
    if len(losses) == 1:
        ((loss, tokens),) = losses.values()
        print(f"{what} {loss:.4f} nats per token over {tokens} supervised tokens")
        return
    from qlora.report.headlines import perplexity

    labels = {"adapter": "base and adapter", "base": "base alone"}
    print(f"{what}, nats per token:")
    rows = [[labels[name], f"{loss:.4f}", perplexity(loss), str(n)] for name, (loss, n) in losses.items()]
    show(["", "loss", "perplexity", "supervised tokens"], rows)


def _evaluate_tasks(
    load: Loader,
    models: dict[str, bool],
    settings: "Settings",
    startup: "Startup",
    device: str,
    json_output: bool,
) -> None:
    """Print the scores of the models on tasks of the harness."""
    from qlora.inference.harness import load_tasks, require_harness, run_tasks

    require_harness()
    with startup.stage(IMPORTS):
        import qlora.inference.load  # noqa: F401
    show_device(startup, device)
    with startup.stage("reading the tasks"):
        loaded = load_tasks(settings)
    scores = {}
    for name, with_adapter in models.items():
        trained = load(with_adapter)
        with startup.stage(f"evaluating {', '.join(settings.tasks)}", own_bars=True):
            scores[name] = run_tasks(trained, settings, loaded)
        del trained
    if json_output:
        plain = {name: [score.as_json() for score in found] for name, found in scores.items()}
        print(json.dumps({"scores": plain, "settings": settings.as_json()}))
        return
    show(*_score_table(scores))


def _score_table(scores: "dict[str, list[Score]]") -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of the scores: one row a metric, one column a model."""
    first, *others = scores.values()
    head = [
        "task",
        "metric",
        "filter",
        "rows",
        *({"adapter": "fine-tuned", "base": "base"}[name] for name in scores),
    ]
    rows = []
    for number, score in enumerate(first):
        same = [score, *(other[number] for other in others)]
        rows.append([score.task, score.metric, score.filter, f"{score.samples:,}", *map(_score, same)])
    return head, rows


def _score(score: "Score") -> str:
    known = score.stderr is not None and not math.isnan(score.stderr)
    return f"{score.value:.4f}{f' ± {score.stderr:.4f}' if known else ''}"
