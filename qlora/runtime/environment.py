"""Software and hardware of this process: versions, commit of the package, CPU, GPUs and the command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "qlora-train"
"""name of the package on the package index, where `qlora` is another project"""

LIBRARIES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
    "triton",
)
OPTIONAL_LIBRARIES = ("wandb", "tensorboard")

PACKAGE = Path(__file__).parents[1]


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def package_version() -> str:
    """Return the version of this package, with its commit if it runs from a git checkout.

    Examples:
        >>> package_version()
        '0.1.0 (commit 5690f58, changed)'
    """
    version = version_of(DISTRIBUTION) or "unknown (not installed)"
    commit = _commit()
    return f"{version} (commit {commit})" if commit else version


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the installed libraries that it uses, by name."""
    found = {name: version_of(name) for name in (*LIBRARIES, *OPTIONAL_LIBRARIES)}
    installed = {name: version for name, version in found.items() if version is not None}
    return {"qlora": package_version(), "python": platform.python_version(), **installed}


def hardware() -> dict[str, Any]:
    """Return CPU, cores, memory and GPUs of this machine. Needs torch, to ask for the GPUs."""
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda if gpus else None,
    }


def cpu_name() -> str:
    """Return the CPU's model name, or its architecture if the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else None


def command() -> str:
    """Return the command line of this process, with `qlora` for the path of the program."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    return shlex.join(["qlora" if name in ("qlora", "__main__.py") else program, *arguments])


def now() -> str:
    """Return date and time with the offset from UTC, to the second, as in ISO 8601."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _commit() -> str | None:
    """Return the short commit of the checkout that holds the package, with a mark if files differ from it."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", PACKAGE.name)
        return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
