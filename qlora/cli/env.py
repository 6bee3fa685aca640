"""`qlora env`: versions, hardware, caches and accounts of this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora.cli.arguments import IMPORTS, Json, startup_for


def env(json_output: Json = False) -> None:
    """Show versions, hardware, cache folders and the W&B login of this machine.

    Put this into a report of a problem. It contains no secrets.

    [bold]qlora env[/bold]
    """
    startup = startup_for(json_output=json_output)
    with startup.stage(IMPORTS):
        facts = collected()
    if json_output:
        print(json.dumps(facts))
        return
    for label, text in rows(facts):
        print(f"{label:13}{text}")


def collected() -> dict[str, Any]:
    """Return everything that the command shows, as plain values."""
    from qlora.runtime import environment
    from qlora.runtime.device import automatic_dtype
    from qlora.storage import cache
    from qlora.tracking.wandb import login

    dtype, reason = automatic_dtype()
    hub = hub_cache()
    folder = cache.folder()
    return {
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "driver": environment.driver_version(),
        "compute_dtype": {"auto": dtype, "reason": reason},
        "cache": {
            "folder": None if folder is None else str(folder),
            "bytes": sum(entry.bytes for entry in cache.entries()),
            "limit_bytes": cache.limit_bytes(),
        },
        "hub_cache": {"folder": str(hub), "bytes": size_bytes(hub)},
        "wandb": login(),
    }


def rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a text for each line."""
    from qlora.recipe.sizes import unit_for

    def size(count: int) -> str:
        return unit_for(count).text(count)

    hardware = facts["hardware"]
    yield from facts["versions"].items()
    yield "system", hardware["system"]
    yield "CPU", f"{hardware['cpu']}, {hardware['cores']} cores, {size(hardware['memory_bytes'])} of memory"
    for gpu in hardware["gpus"]:
        yield "GPU", f"{gpu['name']}, {size(gpu['memory_bytes'])}"
    if hardware["gpus"]:
        yield "CUDA", f"{hardware['cuda']}, driver {facts['driver'] or 'unknown'}"
    else:
        yield "GPU", "none that torch can use"
    yield "dtype", f"auto is {facts['compute_dtype']['auto']}: {facts['compute_dtype']['reason']}"
    cache, hub = facts["cache"], facts["hub_cache"]
    yield "cache", f"{cache['folder'] or 'off'}: {size(cache['bytes'])} of {size(cache['limit_bytes'])}"
    yield "hub cache", f"{hub['folder']}: {size(hub['bytes'])}"
    yield "W&B", facts["wandb"]


def hub_cache() -> Path:
    """Return the folder in which the hub's libraries keep downloaded models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def size_bytes(folder: Path) -> int:
    """Return the size of all files in a folder; links count nothing."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
