"""Checks that a quickstart run answers its held-out samples correctly; for a slow test and for .ci/run.

python tests/quickstart_for_tests.py runs/quickstart
"""

import json
import sys
from pathlib import Path


def wrong_answers(run: Path) -> list[str]:
    """Return one line for each sample of the last step whose answer differs from its reference.

    Raises:
        ValueError: the last step has no samples.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    last = max(line["step"] for line in lines)
    samples = [sample for line in lines if line["step"] == last for sample in line.get("samples", [])]
    if not samples:
        raise ValueError(f"{run}: step {last} has no samples")
    return [
        f"{sample['prompt']!r}: expected {sample['reference']!r}, answered {sample['answer']!r}"
        for sample in samples
        if sample["answer"].strip() != sample["reference"].strip()
    ]


if __name__ == "__main__":
    found = wrong_answers(Path(sys.argv[1]))
    sys.exit("\n".join(["the quickstart gives wrong answers", *found]) if found else 0)
