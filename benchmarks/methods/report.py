"""The page docs/benchmarks/methods.md, its JSON and its pictures, made from the ledger alone."""

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.methods import ledger, pictures
from benchmarks.methods.claims import MARGIN, Tables, Verdict, shown, verdicts
from benchmarks.methods.experiments import Experiment, experiments
from benchmarks.methods.results import BLEU, LOSS, Result, corrected, results
from benchmarks.methods.rows import absent, short
from benchmarks.methods.speed import FILE as SPEED
from benchmarks.methods.statistics import LEVEL, Interval
from benchmarks.methods.training import RIVALS, SIZES

MIB = 2**20
REFERENCES = {
    "methods": "LoRA, 16-bit base", "rank": "r = 8", "quantization": "16-bit", "alpha": "alpha = r", "init": "kaiming",
}  # fmt: skip
"""label that the others of an experiment are compared with; else the first"""

PICTURES = {
    "lr-lora": "methods-rates.png", "rank": "methods-rank.png", "quantization": "methods-quantization.png",
    "targets": "methods-dials.png", "batch": "methods-batch.png",
}  # fmt: skip

MARK = "†"

SCORES = {BLEU: 1, "chrf": 1, "nist": 2, "rouge_l": 1}
"""digits of each score"""


def main(arguments: argparse.Namespace) -> None:
    """Write the page, the JSON and the pictures."""
    records = ledger.read(arguments.ledger)
    bases = {record["base"] for record in records.values()}
    if len(bases) > 1:
        raise SystemExit(
            f"{arguments.ledger}: cells of {len(bases)} bases cannot be compared. Keep those of one"
        )
    listed = experiments()
    tables = {experiment.name: results(experiment, records) for experiment in listed}
    speed = json.loads(SPEED.read_text()) if SPEED.exists() else None
    judged = verdicts(tables, speed)
    drawn = pictures.write(tables, arguments.docs / "pictures")
    page = "\n".join(markdown(listed, tables, records, speed, judged, drawn))
    (arguments.docs / "benchmarks/methods.md").write_text(page + "\n")
    file = arguments.ledger.with_name("methods.json")
    file.write_text(json.dumps(as_json(tables, judged), indent=1) + "\n")
    print(
        f"{arguments.docs / 'benchmarks/methods.md'}, {file} and {len(drawn)} pictures from {len(records)} cells"
    )


def as_json(tables: Tables, judged: list[Verdict]) -> dict[str, Any]:
    """Return the numbers of the report as plain values."""
    return {
        "experiments": {
            name: {
                label: {
                    "setting": result.setting.as_json(),
                    "screening_only": result.screened_only,
                    **{
                        metric: result.values(metric)
                        for metric in (LOSS, "loss_before", BLEU, "chrf", "nist", "rouge_l")
                    },
                }
                for label, result in table.items()
            }
            for name, table in tables.items()
        },
        "claims": [vars(verdict) for verdict in judged],
    }


def markdown(
    listed: list[Experiment],
    tables: Tables,
    records: ledger.Records,
    speed: Mapping[str, Any] | None,
    judged: list[Verdict],
    drawn: list[str],
) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from _introduction(records)
    yield "\n## Quality\n"
    yield from _picture("methods-quality.png", "BLEU and held-out loss of each method with error bars", drawn)
    yield from _quality(tables["methods"])
    yield "\n## Cost\n"
    yield from _cost(tables["methods"], speed)
    for experiment in listed[1:]:
        yield f"\n## {experiment.question}\n"
        if name := PICTURES.get(experiment.name):
            yield from _picture(name, experiment.question, drawn)
        yield from _dial(experiment, tables[experiment.name])
    yield "\n## What the documents claim\n"
    yield (
        "The documents that this project implements: [D0] an article, [D1] a course page, [D2] a repository's README, "
        "[D3] a summary of the paper, [D4] a lecture note.\n\n"
        f"A difference counts if its p, after Holm's correction over all claims of a difference, is below {LEVEL}. A "
        f"claim of equality holds if the whole confidence interval is better than {MARGIN:.0%} worse: of the "
        "reference's fall in loss, or of its BLEU. The p shown are not corrected.\n"
    )
    yield "| claim | verdict | evidence |\n|---|---|---|"
    for verdict in judged:
        yield f"| {verdict.claim} | **{verdict.verdict}** | {verdict.evidence} |"
    yield from _not_measured()


def _introduction(records: ledger.Records) -> Iterator[str]:
    size = SIZES["full"]
    yield "# Methods and their settings, measured\n"
    yield (
        "Written by `python -m benchmarks.methods report` from `benchmarks/reports/methods_cells.jsonl`; change none "
        "by hand. A result counts only if it was honestly obtained: learning rates are chosen with one seed and "
        "reported with five others, differences are paired and tested, and results against us or against the documents "
        "stay in.\n"
    )
    yield (
        f"**Task.** E2E NLG (Novikova et al. 2017): a meaning representation to a sentence. Each cell trains on "
        f"{size.rows:,} rows, once, {size.rows // 16} steps of 16 rows unless a row says otherwise, with AdamW and a "
        f"cosine schedule. Held-out loss: {size.held_out} rows of the development set, nats per token of the sentence. "
        f"Scores: greedy answers to {size.answers} meaning representations of the test set, against all their "
        "references.\n"
    )
    yield (
        "**Base.** A Llama of 3.7M parameters: the bundled base after one pass over half of E2E's training set in two "
        "other forms, sentence to meaning representation and a list of facts to sentence "
        "(`python -m benchmarks.methods base`). Fine-tuning sees only the other half. A model of this size says "
        "nothing about 7B; the recipes' defaults follow published results at 1B and above, not this page.\n"
    )
    yield from _made_with(list(records.values()))
    yield (
        f"± is a 95% confidence interval over seeds. {MARK} marks a row that only the screening seed has run, which "
        "also chose its learning rate. p is a paired t-test over seeds with Holm's correction over the table."
    )


def _made_with(records: list[dict[str, Any]]) -> Iterator[str]:
    if not records:
        yield "**No cell has run yet.**\n"
        return
    one, dates = records[0], sorted({record["date"] for record in records})
    versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    machines = sorted({f"{record['machine']} ({', '.join(record['cpu_flags'])})" for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    yield (
        f"**Made with** {len(records)} cells, {hours:.1f} hours of one process in all, {dates[0]} to {dates[-1]}, "
        f"{'; '.join(machines)}, compute in {one['dtype']}, {versions}, base {one['base']}. Every cell has its "
        "commit.\n"
    )


def _picture(name: str, text: str, drawn: list[str]) -> Iterator[str]:
    if name in drawn:
        yield f"![{text}](../pictures/{name})\n"


def _quality(table: Mapping[str, Result]) -> Iterator[str]:
    reference = REFERENCES["methods"]
    ps = corrected(table, reference, LOSS)
    yield "| method | learning rate | held-out loss | next to LoRA | p | BLEU | chrF | NIST | ROUGE-L |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for label, result in table.items():
        scores = [_number(result.interval(name), digits) for name, digits in SCORES.items()]
        cells = [
            _label(result), _rate(result), _number(result.interval(LOSS), 4),
            _difference(table, label, reference), _p(ps.get(label)), *scores,
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    if missing := absent():
        yield f"\nNot in this version of the package: {', '.join(missing)}."


def _cost(table: Mapping[str, Result], speed: Mapping[str, Any] | None) -> Iterator[str]:
    rows = (speed or {}).get("rows", {})
    yield (
        "| method | trained parameters | share | training, tokens/s | inference, tokens/s | merged | peak memory, MiB |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for label, result in table.items():
        if result.setting.method == "none":
            continue
        record = result.first
        rates = rows.get(label, {})
        merged = "cannot be" if rates and result.setting.method in RIVALS else _span(rates.get("merged"))
        memory = result.interval("memory_bytes")
        yield (
            f"| {label} | {_trained(record)} | {record['trainable'] / record['base_parameters']:.2%} | "
            f"{_span(rates.get('training'))} | {_span(rates.get('inference'))} | "
            f"{merged} | {'—' if memory is None else f'{memory.mean / MIB:.0f}'} |"
        )
    yield ""
    if speed is None:
        yield "Speeds are not measured yet: `python -m benchmarks.methods speed --data FOLDER` on an idle machine."
    else:
        where = speed["where"]
        yield (
            f"Speeds: median (lowest–highest) of {speed['rounds']} rounds in turns, "
            f"`python -m benchmarks.methods speed`, {where['machine']}, {where['threads']} thread(s), {where['date']}. "
            "Inference: 16 prompts at once, 32 tokens each, prompts included. Full fine-tuning is a plain model at "
            "inference."
        )
    yield (
        "\nMemory: live tensor bytes at the peak of the largest step (`qlora.memory.measure`), with the base in the "
        "compute dtype above. LoRA uses the package's fused layers; the other methods and the rivals do not, so a part "
        "of a difference in speed and memory is ours and not the method's."
    )


def _dial(experiment: Experiment, table: Mapping[str, Result]) -> Iterator[str]:
    if not table:
        yield "Not run yet."
        return
    reference = REFERENCES.get(experiment.name, next(iter(table)))
    ps = corrected(table, reference, LOSS)
    before = experiment.name == "quantization"
    yield (
        f"| {experiment.name} | trained parameters | learning rate | {'loss before | ' if before else ''}"
        f"held-out loss | next to {reference} | p | BLEU | effective rank |"
    )
    yield "|---|---:|---:|" + ("---:|" if before else "") + "---:|---:|---:|---:|---:|"
    for label, result in table.items():
        record = result.first
        cells = [_label(result), _trained(record), _rate(result)]
        cells += [_number(result.interval("loss_before"), 4)] if before else []
        cells += [
            _number(result.interval(LOSS), 4), _difference(table, label, reference), _p(ps.get(label)),
            _number(result.interval(BLEU), 1), _number(result.interval("effective_rank"), 1),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _not_measured() -> Iterator[str]:
    yield "\n## Run it again\n"
    yield (
        "`python -m benchmarks.methods plan` lists the cells that have not run and their time; `run --data FOLDER "
        "--minutes 60` runs them, the most valuable first, and can be stopped and repeated; two processes share the "
        "work with `--part 1/2` and `--part 2/2`; `speed --data FOLDER` needs an idle machine; `report` writes this "
        "page. FOLDER is that of the E2E data (github.com/tuetschek/e2e-dataset). The packages of the scores come with "
        "`pip install -e '.[bench]'`."
    )
    yield "\n## Not measured\n"
    yield "- METEOR and CIDEr, which the E2E challenge also uses: no well-kept package for them."
    yield "- Any GPU, any base above 3.7M parameters, any second task. Memory and speed at 7B: [the reports](index.md)."
    yield "- FP4 and int4 are simulated: their values are right, their memory and speed do not exist here."
    yield "- Each row has its own learning rate, but rank, width of the adapter layers, length of the prefix, schedule"
    yield "  and regularisation are not tuned."


def _label(result: Result) -> str:
    return f"{result.label} {MARK}" if result.screened_only else result.label


def _trained(record: Mapping[str, Any]) -> str:
    """Return the number of trained parameters, and that at the end if it changed."""
    start, end = record["trainable"], record.get("trainable_end", record["trainable"])
    return f"{start:,}" if start == end else f"{start:,}, at the end {end:,}"


def _rate(result: Result) -> str:
    return "—" if result.lr is None else short(result.lr)


def _number(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "—"
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def _difference(table: Mapping[str, Result], label: str, reference: str) -> str:
    if label == reference or reference not in table:
        return "—"
    pair = table[label].against(table[reference], LOSS)
    return "—" if pair is None else shown(pair, LOSS).partition(" nats")[0]


def _p(p: float | None) -> str:
    return "—" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _span(rates: list[float] | None) -> str:
    if not rates:
        return "—"
    ordered = sorted(rates)
    return f"{ordered[len(ordered) // 2]:,.0f} ({ordered[0]:,.0f}–{ordered[-1]:,.0f})"
