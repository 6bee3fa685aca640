"""The thread that owns the model: it takes jobs from a queue of limited length and advances those in progress.

Jobs join and leave between two tokens. Nothing else may use the model while the thread runs.
"""

import copy
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from qlora.serving.job import Job, Stopping
from qlora.serving.runners import Runner


class QueueFull(Exception):
    """As many jobs are waiting as may wait."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"the queue is full ({waiting} waiting); try again in {retry_after} s")
        self.retry_after = retry_after
        """seconds after which a place is likely to be free"""


@dataclass
class Totals:
    """Work of an engine so far."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """time with at least one job in progress"""

    @property
    def rate(self) -> float:
        """Tokens a second, while there was work."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Engine:
    """Generates the answers of jobs, in a thread of its own.

    Args:
        runner: computes the answers.
        tokenizer: the model's; the thread uses a copy.
        queue: most jobs that wait while `runner.parallel` are in progress.
    """

    def __init__(self, runner: Runner, tokenizer: PreTrainedTokenizerFast, queue: int) -> None:
        self.runner, self.queue, self.totals = runner, queue, Totals()
        self._tokenizer = copy.deepcopy(tokenizer)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Add a job to the queue.

        Raises:
            QueueFull: the queue has no room.
            Stopping: the engine has been stopped.
        """
        with self._changed:
            self._check_room()
            self._waiting.append(job)
            self._changed.notify()

    def check_room(self) -> None:
        """Raise as `submit` would, before the work of making a job."""
        with self._changed:
            self._check_room()

    def stop(self) -> None:
        """End all jobs before their next token; they fail with `Stopping`."""
        with self._changed:
            self._stopping = True
            for job in (*self._active, *self._waiting):
                job.leave()
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of jobs in progress and waiting."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def _check_room(self) -> None:
        if self._stopping:
            raise Stopping("the server is shutting down")
        self._waiting = deque(job for job in self._waiting if not job.left)
        room = self.queue + self.runner.parallel - len(self._active)
        if len(self._waiting) >= room:
            mean = self.totals.seconds / self.totals.answers if self.totals.answers else 1.0
            raise QueueFull(len(self._waiting), min(60, max(1, math.ceil(mean * (1 + len(self._waiting))))))

    def _run(self) -> None:
        if self.runner.device.type == "cuda":  # each thread has a current GPU of its own
            torch.cuda.set_device(self.runner.device)
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                self._admit()
            if not self._active:
                continue
            began = time.monotonic()
            self._advance()
            self.totals.seconds += time.monotonic() - began
        for job in (*self._active, *self._waiting):
            job.fail(Stopping("the server is shutting down"))
        self._active.clear()
        self._waiting.clear()

    def _admit(self) -> None:
        """Move jobs from the queue to free places; drop those that were left."""
        while self._waiting and len(self._active) < self.runner.parallel:
            job = self._waiting.popleft()
            if not job.left:
                job.begin(self._tokenizer)
                self._active.append(job)

    def _advance(self) -> None:
        before = sum(len(job.tokens) for job in self._active)
        try:
            self.runner.advance(self._active)
        except Exception as error:  # noqa: BLE001 - told to the clients, and the server goes on
            for job in self._active:
                job.fail(error)
        self.totals.tokens += sum(len(job.tokens) for job in self._active) - before
        with self._changed:
            self.totals.answers += sum(job.answered for job in self._active)
            if not self._stopping:
                self._active = [job for job in self._active if not (job.done or job.left)]
