"""Files of rows with one bad row or damaged bytes, in every format, plain and compressed.

`qlora data` reads each. A file that is cut or has a wrong row must be refused by its name, or the row be counted as
left out. Flipped bits inside a text are other text, which no file tells.
"""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import damage, ground
from benchmarks.faults.child import command
from benchmarks.faults.sweep import SECONDS, Case, Judged, Sweep, judge

ROWS = 20
FORMATS = ("jsonl", "json", "csv", "parquet", "txt")
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def open_rows(shared: Path) -> Case:
    """Write the base and return the case."""
    ground.import_all()
    base = ground.tiny_base(shared / "base")

    def case(rng: random.Random, folder: Path) -> Judged:
        kind, rows = rng.choice(FORMATS), _rows(rng)
        file = folder / f"rows.{kind}"
        where = "bytes"
        if rng.random() < 0.5 and kind in ("jsonl", "json", "parquet"):
            number = rng.randrange(ROWS)
            rows[number] = _bad(rng, rows[number])
            where = f"row {number + 1}: {str(rows[number])[:60]}"
        if not _write(file, rows, kind):
            return Judged("works", f"{kind} cannot hold {where}")
        if where == "bytes":
            where = damage.damage_bytes(file, rng)
        packing = rng.choice([*PACKED]) if kind != "parquet" and file.is_file() else ""
        if packing:
            packed = file.with_name(file.name + packing)
            packed.write_bytes(PACKED[packing](file.read_bytes()))
            file.unlink()
            file = packed
            if rng.random() < 0.5:
                where += f"; packed and {damage.damage_bytes(file, rng)}"
        form = (
            {"format": "text", "held_out": 2}
            if kind == "txt"
            else {"format": "prompt-completion", "held_out": 2}
        )
        recipe = ground.settings(base, folder / "run", data={**form, "source": str(file)})
        end = command(["data", ground.write_recipe(folder / "recipe.yaml", recipe), "--rows", 0], SECONDS)
        return judge(end, [file.name], f"{file.name}: {where}")

    return case


def _rows(rng: random.Random) -> list[Any]:
    return [{"prompt": f"Question {n}?", "completion": f"Answer {rng.random()}."} for n in range(ROWS)]


def _bad(rng: random.Random, row: dict[str, Any]) -> Any:
    """Return the row with another value, with a missing or further key, or something else in its place."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(damage.VALUES)
    if kind == 1:
        return {"prompt": row["prompt"]}
    if kind == 2:
        return {**row, "further": rng.choice(damage.VALUES)}
    if kind == 3:
        return {
            **row,
            "completion": rng.choice(["\x00", "\ud800", "</s><s>", "a" * 10**6, " ", "\u202e", "\r\n\r"]),
        }
    return {**row, rng.choice([*row]): rng.choice(damage.VALUES)}


def _write(file: Path, rows: list[Any], kind: str) -> bool:
    """Write the rows; return False if the format cannot hold them."""
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "csv":
        file.write_text(
            "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows)
        )
    elif kind == "txt":
        file.write_text("".join(f"{row['prompt']} {row['completion']}\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        except (pyarrow.ArrowException, AttributeError, TypeError, OverflowError, UnicodeEncodeError):
            return False
    return True


SWEEP = Sweep("rows", "damaged files of rows", 1000, open_rows)
