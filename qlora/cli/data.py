"""`qlora data`: the first rows token by token, and counts of all rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, RecipeArgument, startup_for

if TYPE_CHECKING:
    from rich.text import Text

    from qlora.data import Batches, Dataset, Example
    from qlora.recipe import Recipe


def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Number of rows to show.")] = 3,
    json_output: Json = False,
) -> None:
    """Show the first training rows of a recipe token by token, and count all rows.

    Tokens are separated by |; trained tokens are in [[ ]] and green.

    [bold]qlora data quickstart --rows 1[/bold]
    """
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    startup = startup_for(json_output=json_output)
    with startup.stage(IMPORTS):
        from qlora.data import load_dataset, training_batches
        from qlora.model.tokens import tokenizer_of
    with startup.stage("reading the data") as progress:
        tokenizer = tokenizer_of(loaded)
        dataset = load_dataset(loaded.data, tokenizer, loaded.training.seed, progress=progress)
    batches = training_batches(dataset, loaded)
    shown = list(_first_rows(batches, tokenizer, rows))
    if json_output:
        rows_shown = [asdict(row) for row in shown]
        counts = {**asdict(dataset.counts), "lengths": dataset.lengths, "left_out": dataset.left_out}
        print(json.dumps({"rows": rows_shown, "counts": counts}))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for number, row in enumerate(shown, 1):
        console.print(_text(row, f"row {number}"), soft_wrap=True)
    console.print(_summary(dataset, batches, loaded), soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Token:
    """One token, readable."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """One document of a row."""

    origin: str
    tokens: list[Token]


@dataclass(frozen=True)
class Row:
    """One row of a batch; a packed row has several documents."""

    documents: list[Document]


def _first_rows(batches: "Batches", tokenizer: Any, count: int) -> Iterator[Row]:
    """Yield the first rows of the first epoch in the order of training."""
    for step in range(batches.steps_per_epoch):
        for micro_batch in batches.step_rows(step):
            for row in micro_batch:
                if count == 0:
                    return
                count -= 1
                examples = [batches.examples[index] for index in batches.rows[row]]
                yield Row([Document(example.origin, _tokens(example, tokenizer)) for example in examples])


def _tokens(example: "Example", tokenizer: Any) -> list[Token]:
    ids = example.input_ids.tolist()
    trained = (example.labels == example.input_ids).tolist()
    return [Token(*token) for token in zip(ids, _pieces(ids, tokenizer), trained, strict=True)]


def _pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token, or its name in the vocabulary if it is only part of a character."""
    pieces = []
    before: list[int] = []
    for token_id in ids:
        # decoded after its neighbour: tokenizers drop the space at the start of a text
        piece = tokenizer.decode([*before, token_id]).removeprefix(tokenizer.decode(before))
        if not piece or "\ufffd" in piece:
            piece = tokenizer.convert_ids_to_tokens(token_id)
        pieces.append(piece)
        before = [token_id]
    return pieces


def _text(row: Row, title: str) -> "Text":
    """Format a row for the terminal. The marks alone carry everything, so it reads without colours too."""
    from rich.text import Text

    everything = [token for document in row.documents for token in document.tokens]
    trained = sum(token.trained for token in everything)
    text = Text()
    text.append(f"{title}: {len(everything)} tokens, {trained} trained\n", style="bold")
    for number, document in enumerate(row.documents, 1):
        text.append(f"-- document {number}: {document.origin}\n", style="cyan")
        within = False
        for position, token in enumerate(document.tokens):
            if token.trained != within:
                text.append("[[" if token.trained else "]]", style="bold green")
                within = token.trained
            elif position:
                text.append("|", style="dim")
            text.append(_printable(token.text), style="green" if token.trained else "")
        text.append("]]\n" if within else "\n", style="bold green")
    return text


def _printable(text: str) -> str:
    """Escape control characters, which could control the terminal. Line breaks are shown as \\n and kept."""
    return "".join(
        "\\n\n" if letter == "\n" else letter if letter.isprintable() else repr(letter)[1:-1]
        for letter in text
    )


def _summary(dataset: "Dataset", batches: "Batches", recipe: "Recipe") -> str:
    from qlora.data import remarks
    from qlora.report.lengths import histogram, limits

    counts = dataset.counts
    lengths = sorted(batches.examples.lengths.tolist())
    more = f" {counts.split} more examples from rows that give several," if counts.split else ""
    marked = f", {counts.marked} marked as not to be trained" if counts.marked else ""
    lines = [
        f"rows     {counts.read} read:{more} {counts.train} to train on, {counts.held_out} held out, "
        f"{counts.bad} bad, {counts.dropped} dropped as too long, "
        f"{counts.unsupervised} dropped without trained tokens{marked}",
        f"tokens   {counts.tokens} in the training rows, {counts.supervised} of them trained "
        f"({counts.supervised / counts.tokens:.0%})",
        f"length   median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}, "
        f"limit {recipe.data.max_length}; {counts.truncated} rows were cut",
    ]
    if len(counts.sources) > 1:
        lines += [_source(source) for source in counts.sources]
    if counts.packing_efficiency is not None:
        lines.append(
            f"packing  {len(batches.rows)} packed rows, {counts.packing_efficiency:.1%} of their tokens used"
        )
    lines.append(f"steps    {batches.steps_per_epoch} per epoch")
    lines += [f"note     {remark}" for remark in remarks(counts)]
    lines += [f"bad      {count} {reason}" for reason, count in counts.reasons.items()]
    lines += [f"left out {row}" for row in dataset.left_out]
    lines += ["", f"{'tokens':>15} {'rows':>10}", *histogram(dataset.lengths)]
    if shorter := list(limits(dataset.lengths, recipe.data.max_length)):
        lines += ["", f"{'max_length':>15}       {'longer':>10}", *shorter]
    return "\n".join(lines)


def _source(source: dict[str, Any]) -> str:
    left_out = source["bad"] + source["dropped"] + source["unsupervised"] + source["marked"]
    return (
        f"source   {source['source']}: {source['read']} read, {source['train']} to train on, "
        f"{source['held_out']} held out, {left_out} left out, {source['per_epoch']} in an epoch"
    )
