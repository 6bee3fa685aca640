"""Protocol between the record and the process of an item: one JSON object a line, on standard output."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Write = Callable[[dict[str, Any]], None]


def lines() -> Write:
    """Return a function that sends a line to the record. The output of libraries goes to standard error from now on."""
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(line: dict[str, Any]) -> None:
        protocol.write(json.dumps(line, default=str) + "\n")
        protocol.flush()

    return write


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the options that every item has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the program")
    parser.add_argument("--cache", default="~/.cache/qlora-speed", help="folder for the NF4 checkpoints")
    return parser.parse_args(sys.argv[1:])
