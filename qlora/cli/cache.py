"""`qlora cache`: what is kept from one start to the next, and how to be rid of it."""

import json
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from qlora.cli.arguments import Json

app = typer.Typer(
    help="Show and clear what is kept for the next start: tokenised data and quantized bases.",
    no_args_is_help=True,
)


@app.command("show")
def show(json_output: Json = False) -> None:
    """List all entries, the last used first. QLORA_CACHE=FOLDER moves the cache, QLORA_CACHE=off turns it off."""
    import time

    from qlora.storage import cache

    found = cache.entries()[::-1]
    used = sum(entry.bytes for entry in found)
    if json_output:
        shown = [{**asdict(entry), "path": str(entry.path)} for entry in found]
        where = {"folder": str(cache.folder() or "off"), "bytes": used, "limit_bytes": cache.limit_bytes()}
        print(json.dumps({**where, "entries": shown}))
        return
    for entry in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{when}  {_gib(entry.bytes):>10}  {entry.kind}  {entry.about}")
    print(f"{cache.folder() or 'off'}: {_gib(used)} of {_gib(cache.limit_bytes())}")


@app.command("clear")
def clear(
    kind: Annotated[
        Literal["data", "base"] | None, typer.Argument(help="Only this kind; all if left out.")
    ] = None,
) -> None:
    """Remove what is kept. The next start tokenises and quantizes again."""
    from qlora.storage import cache

    gone = cache.clear(*([kind] if kind else cache.KINDS))
    print(f"Removed {len(gone)} entries, {_gib(sum(entry.bytes for entry in gone))}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
