"""`qlora cache`: show and clear data that later starts reuse."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from qlora.cli.arguments import Json

app = typer.Typer(
    help="Show or clear the cache of tokenised data and quantized bases.",
    no_args_is_help=True,
)


@app.command("show")
def show(json_output: Json = False) -> None:
    """List the cache's entries, most recently used first, and its size.

    Set the environment variable QLORA_CACHE=FOLDER to move the cache,
    QLORA_CACHE=off to turn it off.
    """
    import time

    from qlora.storage import cache

    entries = cache.entries()[::-1]
    used = sum(entry.bytes for entry in entries)
    if json_output:
        shown = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        where = {"folder": str(cache.folder() or "off"), "bytes": used, "limit_bytes": cache.limit_bytes()}
        print(json.dumps({**where, "entries": shown}))
        return
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{when}  {_gib(entry.bytes):>10}  {entry.kind}  {entry.about}")
    print(f"{cache.folder() or 'off'}: {_gib(used)} of {_gib(cache.limit_bytes())}")


@app.command("clear")
def clear(
    kind: Annotated[
        Literal["data", "base"] | None, typer.Argument(help="Remove only entries of this kind.")
    ] = None,
) -> None:
    """Remove the cache's entries. The next start tokenises and quantizes again."""
    from qlora.storage import cache

    removed = cache.clear(*([kind] if kind else cache.KINDS))
    print(f"Removed {len(removed)} entries, {_gib(sum(entry.bytes for entry in removed))}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
