"""Try each causal language model of the installed transformers, tiny, and write the table of what works.

    python -m benchmarks.architectures                      all models that the record lacks, then the page
    python -m benchmarks.architectures llama qwen3_moe      these again
    python -m benchmarks.architectures --page               only write docs/reference/architectures.md

The record, benchmarks/reports/architectures.jsonl, gets a line as soon as a model is done, so the sweep can be stopped
and started again. Exit code 1 if a cell crashed or was wrong, or if more models are refused than `page.MOST_REFUSED`.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.architectures import model_types, page, record
from benchmarks.architectures.sweep import SECONDS, prepare, run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="model types; default: all that the record lacks")
    parser.add_argument("--record", type=Path, default=record.FILE, help="JSON lines, one a model")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a model")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(model_types.causal()):
        parser.error(f"no causal language model of text: {', '.join(sorted(unknown))}")
    done = record.read(given.record)
    names = given.names or [name for name in model_types.causal() if name not in done]
    if names and not given.page:
        prepare()
        try:
            for name in names:
                line = run(name, given.seconds)
                record.add(given.record, line)
                print(page.progress(line), flush=True)
        except KeyboardInterrupt:
            print("stopped; without names, the command continues with the models that the record lacks")
            return 130
    done = record.read(given.record)
    if given.record == record.FILE:
        page.FILE.write_text(page.text(done))
    faults = page.faults(done)
    print("\n".join(faults) or f"{len(done)} models, no fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
