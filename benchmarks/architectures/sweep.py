"""One model in a process of its own, cell by cell."""

import json
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.architectures import model_types, record
from benchmarks.faults.child import HANG, ended

SECONDS = 120.0
"""time limit of a model"""

WORKS, REFUSED, FAULT, UNREACHED = "works", "refused", "fault", "unreached"


def prepare() -> None:
    """Import what the cells need, once for all processes."""
    import os

    import torch

    os.environ["QLORA_CACHE"] = "off"  # the cache of the user stays as it is
    torch.set_num_threads(1)
    import benchmarks.architectures.cells  # noqa: F401

    record.where()  # the commit is that of the code that was imported


def run(model_type: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Run all cells of a model in a forked process; return its line of the record."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        end = ended(partial(_cells, model_type, work), seconds)
        file = work / "cells.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    cells = {cell: {"kind": kind, "said": said.replace(folder, "FOLDER")} for cell, kind, said in found}
    if end.code != 0:  # the process was killed, or took too long
        from benchmarks.architectures.cells import CELLS

        said = f"no end within {seconds:.0f} s" if end.code == HANG else f"code {end.code}: {end.err[-300:]}"
        first = next((cell for cell in ("write", *CELLS) if cell not in cells), "end")
        cells[first] = {"kind": FAULT, "said": said.replace(folder, "FOLDER")}
    return {
        "model": model_type,
        "class": model_types.class_name(model_type),
        "cells": cells,
        "seconds": round(time.monotonic() - began, 1),
        **record.where(),
    }


def _cells(model_type: str, work: Path) -> None:
    """Run the cells and write each one's outcome into `work` as soon as it is known."""
    from benchmarks.architectures.cells import AFTER_TRAINING, CELLS, Case

    case = Case(model_type, work)
    with (work / "cells.jsonl").open("w") as out:
        kinds: dict[str, str] = {}
        for name, cell in {"write": _written, **CELLS}.items():
            if kinds.get("write", WORKS) != WORKS or (name in AFTER_TRAINING and kinds["train"] != WORKS):
                kinds[name], said = UNREACHED, ""
            else:
                kinds[name], said = outcome(partial(cell, case))
            print(json.dumps([name, kinds[name], said]), file=out, flush=True)


def _written(case: Any) -> str:
    case.write()
    return ""


def outcome(cell: Any) -> tuple[str, str]:
    """Call a cell; return its kind and its note, or the message of its error."""
    from qlora.errors import QloraError

    try:
        return WORKS, cell()
    except QloraError as error:
        return REFUSED, str(error)
    except AssertionError as error:
        return FAULT, f"wrong: {str(error)[:400]}"
    except Exception as error:  # noqa: BLE001 - the model's code can fail in any way
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "/qlora/" in place.filename] or list(places)
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}, {Path(places[-1].filename).name}:{places[-1].lineno}"
        return FAULT, f"{type(error).__name__}: {str(error)[:300]} ({at})"
