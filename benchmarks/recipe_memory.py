"""Forecast the GPU memory of each shipped recipe and store it, so that `qlora recipes list` shows it at once.

    python benchmarks/recipe_memory.py            any machine, a few minutes; nothing is downloaded
    python benchmarks/recipe_memory.py phi-4      only these recipes

The numbers go to qlora/bundled/recipe_memory.json: bytes that must be on the GPU, without the paged optimizer state,
which can move to the host. Rows count as long as the recipe allows.
"""

import argparse

from qlora.memory.estimate import estimate
from qlora.recipe import Recipe, shipped

GIB = 2**30


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="recipes; default: all that download their base")
    found = shipped.memory()
    for name in parser.parse_args().names or on_the_hub():
        found[name] = needed_bytes(name)
        print(f"{name}: {found[name] / GIB:.1f} GiB", flush=True)
        shipped.write_memory(found)


def on_the_hub() -> list[str]:
    """Return the names of the recipes whose base is on the hub."""
    return [name for name in shipped.names() if "/" in Recipe.load(name).base.model.removeprefix("bundled/")]


def needed_bytes(name: str) -> int:
    """Forecast the bytes that a shipped recipe needs on a GPU."""
    return estimate(Recipe.load(name, ["training.device=cuda"])).needed_bytes


if __name__ == "__main__":
    main()
