"""The program `qlora`, also as `python -m qlora`: Ctrl-C ends it with one line, from its first import on."""

import atexit
import signal
import sys


def main() -> None:
    """Import the command line, which takes a part of a second, and run it."""
    # The last of all exit functions: the work is done, and Python's own end would die of a Ctrl-C
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        from qlora.runtime.streams import open_standard_streams

        open_standard_streams()
        from qlora.cli import main as run
    except KeyboardInterrupt:
        print("qlora: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
