"""Description of the machine and the software of a measurement."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "liger-kernel",
    "triton",
    "unsloth",
)
ROOT = Path(__file__).parents[2]


def describe(device: str, threads: int | None) -> dict[str, Any]:
    """Return the machine, its load, the versions, the date and the commit."""
    description = {
        "machine": _name(device),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "MKL_", "KMP_"))
        },
    }
    if device == "cuda":
        description["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        description["cuda"] = torch.version.cuda
    return description


def slug(device: str) -> str:
    """Return a short name of the machine for file names, such as `cpu-2core-avx2` or `h100`."""
    if device == "cuda":
        words = torch.cuda.get_device_name(0).lower().replace("nvidia", "").split()
        return "-".join(words)
    return f"cpu-{os.cpu_count()}core-{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '-')}"


def _name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit, with a note if the working tree has changes."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
