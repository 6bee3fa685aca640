"""Description of the machine and the software of a cell, short enough for every line of the ledger."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.methods.scores import PACKAGES
from benchmarks.speed.machine import ROOT, describe

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
"""flags of a CPU that decide which dtype and which kernels torch uses"""


def where(threads: int) -> dict[str, Any]:
    """Return machine, flags of its CPU, threads, versions, commit and date."""
    found = describe("cpu", threads)
    wanted = ("torch", "transformers", "bitsandbytes")
    return {
        "machine": found["machine"],
        "cores": found["cores"],
        "threads": threads,
        "cpu_flags": cpu_flags(),
        "versions": {name: found["versions"][name] for name in wanted}
        | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": found["date"],
    }


def commit() -> str:
    """Return the commit, with a note if code has changed since; the growing ledger is no change."""
    git = ["git", "-C", str(ROOT)]
    code = ["qlora", "benchmarks", "pyproject.toml", ":!benchmarks/reports"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "--", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (" with changes" if changed.strip() else "")


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Return those of `FLAGS` that the CPU has."""
    text = file.read_text() if file.exists() else ""
    present = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return [flag for flag in FLAGS if flag in present]
