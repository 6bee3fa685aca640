"""Folders of runs with one damaged file, for `train --resume`, `report`, `generate` and `merge`.

An unfinished run that is resumed must end with the same adapter and the same records, or name the damaged file; lines
of metrics.jsonl that are lost are named and not trained again.
"""

import random
import shutil
from pathlib import Path

from benchmarks.faults import damage, ground
from benchmarks.faults.child import command
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge


def open_runs(shared: Path) -> Case:
    """Train a run to its end and another one to two thirds, and return the case."""
    ground.import_all()
    base = ground.tiny_base(shared / "base")
    run = shared / "run"
    recipe = ground.write_recipe(shared / "recipe.yaml", ground.settings(base, run))
    ground.trained(recipe)
    whole = ground.result_of(run)
    finished = run.rename(shared / "finished")
    unfinished = shutil.copytree(finished, shared / "unfinished")
    for name in ("adapter", "result.json", "report.html", "memory.json", "memory.md", "memory.png"):
        path = unfinished / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def case(rng: random.Random, folder: Path) -> Judged:
        done = rng.random() < 0.4
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished if done else unfinished, run)
        file = _file(rng, run)
        change = (
            damage.another_value if file.suffix == ".json" and rng.random() < 0.4 else damage.damage_bytes
        )
        what = f"{file.relative_to(run)}: {change(file, rng)}"
        words = ["train", str(recipe), "--resume", "--quiet"]
        if done:
            words = rng.choice(
                [
                    words,
                    ["report", str(run)],
                    ["merge", str(run), "--to", f"{folder}/merged", "--tokens", "0", "--onto", "nf4"],
                ]
            )
        what += f"; {words[0]} of the {'finished' if done else 'unfinished'} run"
        end = command(words, SECONDS)
        judged = judge(end, [file.name, file.parent.name], what)
        if judged.kind != "works" or words[0] != "train":
            return judged
        result = ground.result_of(run)
        if result is None or whole is None or result[0] != whole[0]:
            return Judged("changed", what, end.said[-600:])
        if result[1] == whole[1]:
            return Judged("same", what)
        return judged if file.name in end.err or done else Judged("silent", what, end.said[-600:])

    return case


def _file(rng: random.Random, run: Path) -> Path:
    """Choose a file of the run; the small ones that a command reads are chosen most often."""
    names = ["run.json", "result.json", "metrics.jsonl", "recipe.yaml", "facts.json", "memory.json"]
    often = [run / name for name in names if (run / name).is_file()]
    newest = max((run / "checkpoints").iterdir())
    return rng.choice([*often, *often, *(path for path in sorted(newest.rglob("*")) if path.is_file())])


SWEEP = Sweep("runs", "damaged folders of runs", 300, open_runs)
