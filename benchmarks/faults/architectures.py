"""Run every command over small models of many architectures, and see what comes of each.

    python -m benchmarks.faults.architectures --models TOOL.py --out architectures.jsonl [--only llama gpt2]

`--models` is a folder of checkpoints, one folder each, or a Python file with a dictionary `A` of names and a function
`save(name, folder)` that writes one. Each model is checked, estimated, trained for three steps over NF4 and over the
plain base, asked for an answer, evaluated, and merged; the merged model is evaluated with transformers alone. A case
works, or is refused (a documented exit code and one message that names a key, file, layer or class), or is a fault: a
traceback, a hang, a message without a name, an evaluation that a merge changes, or training that is refused although
the estimate of the same recipe is not. A merged model that transformers cannot run is no fault if it cannot run the
base either.

`--out` gets a JSON line per case as soon as it ends; a second start leaves out what is there. The summary counts the
cases, and the script ends with 1 if there was a fault.
"""

import argparse
import importlib.util
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.child import command, ended

REFUSALS = {2: "recipe or usage", 4: "model"}
"""exit codes that refuse a model"""

NAME = re.compile(
    r"\b[a-z]+\.[a-z_]\w+|\w+\.(?:json|safetensors|py)\b|\b[A-Z]\w+(?:For|Text)[A-Z]\w+|\b[a-z]+_[a-z_]+\b"
)
"""a key of the recipe, a file, a layer or the class of a model or of its part"""

MERGE_CHANGES = 0.005
"""largest change of the mean loss by a merge, as a part of it, that is no fault: weights are rounded to bfloat16"""

ROWS = [
    {"prompt": f"Order {n}: {n} red lamps to Anna.", "completion": f" lamps={n} color=red to=Anna"}
    for n in range(24)
]


def main() -> int:
    """Run the command line; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of checkpoints, or a Python file")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is there is not run again")
    parser.add_argument("--only", nargs="*", help="names of models; default: all")
    parser.add_argument("--seconds", type=float, default=120.0, help="a case that takes longer hangs")
    arguments = parser.parse_args()
    import qlora.cli.train
    import qlora.inference.generate
    import qlora.merging.merge
    import qlora.training.check  # noqa: F401 - once, for all children

    done = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.exists()
        else []
    )
    finished = {(line["model"], line["case"]) for line in done}
    with arguments.out.open("a") as out:
        for name, write in models(arguments.models, arguments.only):
            if (name, "merged none") in finished:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                for line in cases(name, write, Path(scratch), arguments.seconds):
                    if (name, line["case"]) not in finished:
                        done.append(line)
                        print(json.dumps(line), file=out, flush=True)
    print(summary(done))
    return int(any(line["kind"] == "fault" for line in done))


def models(source: Path, only: list[str] | None) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the name of each model, and a function that writes its checkpoint into a folder."""
    if source.is_dir():
        names = sorted(path.parent.name for path in source.glob("*/config.json"))
        save: Callable[[str, Path], object] = lambda name, folder: shutil.copytree(source / name, folder)  # noqa: E731
    else:
        spec = importlib.util.spec_from_file_location("models_of_sweep", source)
        assert spec is not None, f"{source} is no Python file"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names, save = list(module.A), module.save
    for name in names:
        if not only or name in only:
            yield name, partial(save, name)


def cases(name: str, write: Callable[[Path], object], work: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Run all cases of one model in `work`; yield a line each."""
    made = ended(lambda: write(work / "base"), seconds)
    if made.code != 0:
        yield _line(name, "write", "unmade", 0.0, made.err[-300:])
        return
    runs_plainly = ended(partial(load_plainly, work / "base"), seconds).code == 0
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    yield _case(name, "check", ["check", recipe(work, "nf4")], work, seconds)
    estimate = _case(name, "estimate", ["estimate", recipe(work, "nf4")], work, seconds)
    yield estimate
    yield _case(
        name, "packing", ["train", recipe(work, "packing", quantization="none", packing=True)], work, seconds
    )
    for base in ("nf4", "none"):
        run = work / "runs" / base
        train = _case(name, f"train {base}", ["train", recipe(work, base, quantization=base)], work, seconds)
        if base == "nf4":
            train = contradicted(train, estimate)
        yield train
        if train["kind"] != "works":
            continue
        for asked in (["generate", str(run), "--prompt", "Order 3"], ["eval", str(run), "--json"]):
            yield _case(name, f"{asked[0]} {base}", asked, work, seconds)
        for onto in ("dequantized", "original", "nf4") if base == "nf4" else ("original",):
            to = work / f"merged-{base}-{onto}"
            case = _case(
                name,
                f"merge {base} {onto}",
                ["merge", str(run), "--to", str(to), "--onto", onto],
                work,
                seconds,
            )
            if case["kind"] == "works" and (base, onto) in (("nf4", "dequantized"), ("none", "original")):
                case = _compared(case, to)
            yield case
            if case["kind"] == "works":
                began = time.monotonic()
                loaded = ended(partial(load_plainly, to), seconds)
                kind = "works" if loaded.code == 0 or not runs_plainly else "fault"
                yield _line(name, f"load {base} {onto}", kind, time.monotonic() - began, loaded.err[-600:])
    yield _line(name, "merged none", "works", 0.0, "all cases have run")


def recipe(work: Path, name: str, *, quantization: str = "nf4", packing: bool = False) -> str:
    """Write a recipe for the base in `work`; return its path."""
    settings = {
        "base": {
            "model": str(work / "base"), "quantization": quantization, "compute_dtype": "float32",
            "allow_unquantized": True,
        },
        "adapter": {"rank": 4, "targets": "all-linear"},
        "data": {
            "source": str(work / "rows.jsonl"), "held_out": 4, "format": "prompt-completion", "max_length": 64,
            "packing": packing,
        },
        "training": {"max_steps": 3, "micro_batch_size": 2, "global_batch_size": 4, "samples": 0, "device": "cpu"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "output": str(work / "runs" / name),
    }  # fmt: skip
    file = work / f"{name}.json"  # JSON is YAML
    file.write_text(json.dumps(settings))
    return str(file)


def _case(name: str, case: str, arguments: list[str], work: Path, seconds: float) -> dict[str, Any]:
    """Run one command in a process of its own; return its line."""
    began = time.monotonic()
    end = command(arguments, seconds)
    took, text = time.monotonic() - began, end.said.replace(str(work), "WORK")
    if end.code == 0:
        notes = [line for line in text.splitlines() if line.startswith(("note", "not checked"))]
        return _line(name, case, "works", took, "\n".join(notes))
    message = text[text.rfind("qlora: ") :] if "qlora: " in text else ""
    refused = end.code in REFUSALS and NAME.search(message) and not end.is_traceback
    text = message if refused else f"code {end.code}\n{text[-1800:]}"
    return _line(name, case, "refused" if refused else "fault", took, text)


def contradicted(train: dict[str, Any], estimate: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a training, a fault if it is refused although the estimate of its recipe works."""
    if train["kind"] == "refused" and estimate["kind"] == "works":
        return {**train, "kind": "fault", "said": f"estimate accepts what train refuses: {train['said']}"}
    return train


def load_plainly(folder: Path) -> None:
    """Load a merged model with transformers alone; raise if a weight is missing, left over, or not finite."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {problem: sorted(names) for problem, names in report.items() if names}
    assert not problems, f"transformers reports {problems}"
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 15)[None]).logits
    assert logits.isfinite().all(), "the logits are not finite"


def _compared(case: dict[str, Any], merged: Path) -> dict[str, Any]:
    """Return the line of a merge, a fault if the merge changed the evaluation."""
    record = json.loads((merged / "merge.json").read_text())
    losses = [math.log(judged["perplexity"]) for judged in (record["live"], record["judged"][0])]
    difference = abs(losses[0] - losses[1])
    same = math.isfinite(difference) and difference <= MERGE_CHANGES * losses[0]
    return {**case, "kind": "works" if same else "fault", "losses": losses}


def _line(name: str, case: str, kind: str, seconds: float, said: str) -> dict[str, Any]:
    return {"model": name, "case": case, "kind": kind, "seconds": round(seconds, 1), "said": said}


def summary(lines: list[dict[str, Any]]) -> str:
    """Return a table of the cases, counted by kind, and the models that are refused or faulty."""
    counts = Counter((line["case"], line["kind"]) for line in lines if line["case"] != "merged none")
    kinds = ("works", "refused", "fault", "unmade")
    rows = [f"{'case':24}" + "".join(f"{kind:>9}" for kind in kinds)]
    for case in dict.fromkeys(case for case, _ in counts):
        rows.append(f"{case:24}" + "".join(f"{counts[case, kind]:>9}" for kind in kinds))
    for kind in kinds[1:]:
        named = [f"{line['model']} ({line['case']})" for line in lines if line["kind"] == kind]
        rows += [f"{kind}: {', '.join(named)}"] if named else []
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
