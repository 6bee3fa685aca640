"""The page of the documentation with the table, made from the record alone."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docs/reference/architectures.md"

MOST_REFUSED = 10
"""models that may be refused"""

REASONS: Mapping[str, str] = {
    "is not causal": "a token sees later ones, so its loss would not be that of a prediction",
    "changes its logits in a way": "layers between the decoder and the output head, which the loss does not compute",
}
"""written list of reasons to refuse a model: a pattern of the message -> the reason"""

COLUMNS: Mapping[str, str] = {
    "estimate": "estimate",
    "train": "trains",
    "forecast": "forecast off by",
    "packed": "packing",
    "checkpointed": "checkpointing",
    "adapter": "adapter",
    "generate": "generates",
    "merged": "merges",
}
"""cell -> heading, after the columns of the weights and the passes"""

Record = Mapping[str, Mapping[str, Any]]

INTRODUCTION = """\
# Architectures

Each causal language model of text in transformers {transformers}, tiny and with random weights, was fine-tuned with
LoRA on all linear layers over NF4, and each column of the table was checked:

- *NF4*: share of the linear weights that is quantized, the experts of a mixture included.
- *passes*: fused, or transformers' code around our linear layers.
- *estimate*: the memory is known from config.json alone.
- *trains*: three steps, with a finite held-out loss.
- *forecast off by*: forecast memory next to the measured peak of live tensor bytes.
- *packing*: the loss of packed rows is that of the same rows, each for itself.
- *checkpointing*: `activation_checkpointing: full` changes no gradient.
- *adapter*: saved, and loaded over a new base, it gives the same logits.
- *generates*: each token that it writes with a cache is the most likely one of a pass without a cache.
- *merges*: transformers alone loads the merged model in 16 bits, with the logits of base and adapter.

Where a command refuses a model, it says why in one line, and the lists below repeat it. Numbers and tolerances are in
`benchmarks/architectures`; the base was computed in float32 on {machine}, with torch {torch} and bitsandbytes
{bitsandbytes}, {dates}, commit {commits}. The table and this page come from

```console
$ python -m benchmarks.architectures
```
"""


def text(record: Record) -> str:
    """Return the page."""
    return "\n".join([*_introduction(record), *_table(record), *_refusals(record), *_others()]) + "\n"


def faults(record: Record) -> list[str]:
    """Return what must not be in the record: faults, refusals without a written reason, and too many of them."""
    found = [
        f"{name}, {cell}: {one['said']}"
        for name, line in record.items()
        for cell, one in line["cells"].items()
        if one["kind"] == "fault"
    ]
    refused = refused_models(record)
    found += [f"{name}: no written reason: {said}" for name, said in refused.items() if reason(said) is None]
    return found + (
        [f"{len(refused)} models are refused, more than {MOST_REFUSED}"]
        if len(refused) > MOST_REFUSED
        else []
    )


def refused_models(record: Record) -> dict[str, str]:
    """Return the models that do not train, each with the message."""
    trained = {name: line["cells"].get("train", line["cells"]["write"]) for name, line in record.items()}
    return {name: cell["said"] for name, cell in trained.items() if cell["kind"] == "refused"}


def reason(said: str) -> str | None:
    """Return the written reason of a refusal; None if there is none."""
    return next((why for pattern, why in REASONS.items() if re.search(pattern, said)), None)


def progress(line: Mapping[str, Any]) -> str:
    """Return the outcome of a model in a line for the terminal."""
    counts = Counter(cell["kind"] for cell in line["cells"].values())
    named = [
        f"{name}: {cell['said']}"
        for name, cell in line["cells"].items()
        if cell["kind"] in ("refused", "fault")
    ]
    return f"{line['model']} ({line['seconds']} s): {counts['works']} work" + "".join(
        f"\n    {one}" for one in named
    )


def _introduction(record: Record) -> Iterator[str]:
    lines = list(record.values())
    last = max(lines, key=lambda line: line["date"])
    days = sorted({line["date"][:10] for line in lines})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = sorted({line["commit"][:10] for line in lines})
    yield INTRODUCTION.format(
        **last["versions"],
        machine=last["machine"],
        dates=dates,
        commits=", ".join(f"`{one}`" for one in commits),
    )
    works = sum(line["cells"].get("train", {}).get("kind") == "works" for line in lines)
    whole = sum(all(cell["kind"] == "works" for cell in line["cells"].values()) for line in lines)
    yield f"Of {len(lines)} model types {works} train, {whole} of them with every column of the table.\n"


def _table(record: Record) -> Iterator[str]:
    heads = ["model type", "NF4", "passes", *COLUMNS.values()]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for name, line in record.items():
        cells = line["cells"]
        shown = [_said(cells, "weights").split(";")[0], _said(cells, "passes")]
        shown += [_said(cells, cell) if cell == "forecast" else _short(cells, cell) for cell in COLUMNS]
        yield f"| {name} | " + " | ".join(shown) + " |"


def _said(cells: Mapping[str, Any], name: str) -> str:
    cell = cells.get(name, {"kind": "unreached"})
    return str(cell["said"]) if cell["kind"] == "works" else _short(cells, name)


def _short(cells: Mapping[str, Any], name: str) -> str:
    kind = cells.get(name, {"kind": "unreached"})["kind"]
    return {"works": "yes", "refused": "refused", "fault": "**fault**", "unreached": ""}[kind]


def _refusals(record: Record) -> Iterator[str]:
    """Yield the refused models, the refused columns with their models, and what is not in NF4."""
    refused = refused_models(record)
    yield f"\n## Refused models\n\n{len(refused)} models are refused, for these reasons:\n"
    for name, said in refused.items():
        yield f"- {name}: {reason(said) or 'no written reason'}. The message: *{_plain(said)}*"
    yield "\n## Refused columns\n"
    for cell in COLUMNS:
        by_message: dict[str, list[str]] = defaultdict(list)
        for name, line in record.items():
            one = line["cells"].get(cell, {"kind": "unreached"})
            again = cell == "forecast" and line["cells"]["estimate"]["kind"] == "refused"
            if one["kind"] == "refused" and name not in refused and not again:
                by_message[_general(one["said"], line["class"])].append(name)
        for message, names in by_message.items():
            yield f"- *{COLUMNS[cell]}*, {', '.join(names)}: {message}"
    yield "\n## Not in NF4\n"
    kept: dict[str, list[str]] = defaultdict(list)
    for name, line in record.items():
        for kind in _said(line["cells"], "weights").split("; ")[1:]:
            kept[kind].append(name)
    for kind, names in kept.items():
        yield f"- {kind}: {', '.join(names)}"


def _general(said: str, class_name: str) -> str:
    """Return a message without the class, the numbers and the layers of one model, so that models share it."""
    said = re.sub(r" \((?:a hidden state changes by|\w+ in \w+\.py:\d+|[\w.]+\.layers\.)[^)]*\)", "", said)
    said = re.sub(r"^FOLDER/base: \d+ of the model's layers", "FOLDER: some of the model's layers", said)
    return _plain(said.replace(class_name, "the model"))


def _plain(said: str) -> str:
    return re.sub(r"\s+", " ", said).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _others() -> Iterator[str]:
    from benchmarks.architectures import model_types

    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in model_types.others().items():
        by_reason[why].append(name)
    total = sum(map(len, by_reason.values()))
    yield "\n## Other model types\n"
    yield f"transformers lists {total} more as causal language models, which the table leaves out:\n"
    for why, names in by_reason.items():
        yield f"- {why}: {len(names)} ({', '.join(names)})"
