"""The program `qlora`, also as `python -m qlora`: Ctrl-C ends it with one line, from its first import on."""

import signal
import sys


def main() -> None:
    """Import the command line, which takes a part of a second, and run it."""
    try:
        from qlora.cli import main as run
    except KeyboardInterrupt:
        print("qlora: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
