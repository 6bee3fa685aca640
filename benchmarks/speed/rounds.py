"""Runs the contenders in rounds, each in a fresh process, so that a slow phase of the machine affects all of them."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed.contenders import Contender
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.prepare import Prepared, Setting

ROOT = Path(__file__).parents[2]


@dataclass
class Comparison:
    """Setting of a comparison and the answers of all contenders."""

    setting: Setting
    prepared: Prepared
    contenders: list[Contender]
    warmup: int
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """contender's name -> one answer per round"""
    product_rates: list[float] = field(default_factory=list)
    """operations per second of plain matrix products, one measurement per round"""


@dataclass(frozen=True)
class Runner:
    """Starts the processes of a comparison."""

    threads: int | None = None
    """threads of torch in every process; None: torch's default"""
    timeout: float = 3600.0
    """seconds after which a process is killed"""
    report: Callable[[str], object] = print
    record: Path | None = None
    """file to which every answer is appended at once, one JSON object a line"""

    def compare(
        self,
        setting: Setting,
        contenders: Sequence[Contender],
        *,
        rounds: int,
        warmup: int,
    ) -> Comparison:
        """Run every contender in every round; every second round runs in reverse order.

        Args:
            setting: Architecture, tokens and hyperparameters.
            contenders: The programs to compare.
            rounds: Fresh processes per contender.
            warmup: Steps that are not timed.

        Returns:
            All answers. A contender that fails in the first round is not run again.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prepared = self.prepare(setting, folder)
            job = prepared.job(setting, warmup=warmup)
            comparison = Comparison(setting, prepared, list(contenders), warmup)
            for number in range(rounds):
                comparison.product_rates.append(self._product_rate(job, folder))
                order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
                for contender in order:
                    earlier = comparison.answers.setdefault(contender.name, [])
                    if earlier and earlier[0].error is not None:
                        continue  # would fail again
                    answer = self.run(contender, job, folder)
                    earlier.append(answer)
                    self._keep(number, contender, answer)
                    self.report(
                        f"round {number + 1}/{rounds}  {contender.name:<28} {_summary(answer, warmup)}"
                    )
        return comparison

    def _keep(self, number: int, contender: Contender, answer: Answer) -> None:
        """Append an answer to the record, so that a run that is cut short keeps what it has."""
        if self.record is not None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            line = {"round": number + 1, "contender": contender.name, **dataclasses.asdict(answer)}
            with self.record.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def prepare(self, setting: Setting, folder: Path) -> Prepared:
        """Prepare the common checkpoint, adapter and workload in a separate process."""
        file = folder / "setting.json"
        file.write_text(setting.to_json())
        out = self._process(["-m", "benchmarks.speed.prepare", str(file)], folder)
        if out.returncode != 0:
            raise SystemExit(f"preparing the comparison failed:\n{out.stderr[-2000:]}")
        return Prepared(**json.loads(out.stdout.strip().splitlines()[-1]))

    def run(self, contender: Contender, job: Job, folder: Path) -> Answer:
        """Run one contender in a fresh process; return its answer, or the error as an answer."""
        file = folder / "job.json"
        file.write_text(dataclasses.replace(job, flags=contender.flags, started=time.time()).to_json())
        try:
            out = self._process([*contender.command, str(file)], folder)
        except subprocess.TimeoutExpired:
            return Answer(error=f"not done after {self.timeout:.0f} s")
        try:
            return Answer.parse(out.stdout)
        except (ValueError, IndexError, TypeError):
            return Answer(error=f"ended with exit code {out.returncode}: {out.stderr[-500:]}")

    def _product_rate(self, job: Job, folder: Path) -> float:
        file = folder / "job.json"
        file.write_text(job.to_json())
        out = self._process(["-m", "benchmarks.speed.matmul", str(file)], folder)
        return float(json.loads(out.stdout.strip().splitlines()[-1])["both"])

    def _process(self, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            # Compiled code is reused by later rounds of this run, but not by the next run
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }
        if self.threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )


def _summary(answer: Answer, warmup: int) -> str:
    if answer.error is not None:
        return answer.error.splitlines()[0][:120]
    timed = sorted(answer.seconds[warmup:])
    return f"{timed[len(timed) // 2]:8.3f} s per step, loss {answer.losses[0]:.4f} -> {answer.losses[-1]:.4f}"
