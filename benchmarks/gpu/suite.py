"""Run the tests that need a GPU, and report each one that fails."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.lines import arguments, lines

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the command line; return pytest's exit code."""
    options, write = arguments(__doc__), lines()
    chosen = ["-m", "gpu", "tests"]
    if options.tiny:  # a few of the same tests, on a CPU
        chosen = ["-m", "not slow and not gpu", "tests/test_on_gpu.py", "-k", "attention"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.Popen([*command, *chosen], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    last = ""
    for text in run.stdout:
        print(text, end="", file=sys.stderr, flush=True)
        last = text.strip() or last
        if found := re.match(r"(FAILED|ERROR) (\S+::\S+)(?: - (.*))?", text):
            write({"test": found[2], "error": found[3] or found[1].lower()})
    code = run.wait()
    write({"tests": last, "code": code})
    return code


if __name__ == "__main__":
    sys.exit(main())
