"""TensorBoard: a copy of the record as event files in `<run>/tensorboard`, if the package is installed.

An event is in its file before the call returns. `tensorboard`'s own writer keeps events back for two minutes, and a
kill would take with them steps before the newest checkpoint, which no resumed run takes again.

A resumed run begins a new file. Its first event tells TensorBoard to forget what the files before it hold of later
steps (SummaryWriter calls that purge_step), so that every step is shown once.
"""

import re
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.tracking.backend import Backend, Run
from qlora.tracking.sink import Metrics, Sample, Sink, memory_totals


class TensorBoard(Sink):
    """Writes the run's next event file."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names, and a clock may be set back.
        number = 1 + len(list(folder.glob("events.*")))
        self._file = (folder / f"events.out.tfevents.{number:010}").open("ab")
        self._event, self._records = Event, RecordWriter(self._file)
        self._step = run.resume_step
        # A run that goes on from no checkpoint takes step 0, its first evaluation, again.
        first = run.resume_step + 1 if run.resume_step else 0
        self._write(first, file_version="brain.Event:2")
        self._write(first, session_log={"status": "START"})

    def step(self, record: Metrics) -> None:
        """The record's numbers under their own names, at its step."""
        self._step = record["step"]
        self._numbers({name: value for name, value in record.items() if name != "step"})

    evaluation = step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Prompt, expected answer and answer of each, as text."""
        for number, sample in enumerate(samples, 1):
            text = {"dtype": "DT_STRING", "string_val": [_markdown(sample)], "tensor_shape": {}}
            shown = {"plugin_data": {"plugin_name": "text"}}
            self._summary(step, [{"tag": f"samples/{number}", "metadata": shown, "tensor": text}])

    def memory(self, content: Metrics, picture: Path) -> None:
        """The totals and the picture, at the last step."""
        self._numbers(memory_totals(content))
        png = picture.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # of its first chunk
        image = {"width": width, "height": height, "colorspace": 4, "encoded_image_string": png}
        self._summary(self._step, [{"tag": "memory", "image": image}])

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Close the file."""
        self._file.close()

    def _numbers(self, numbers: Metrics) -> None:
        self._summary(self._step, [{"tag": name, "simple_value": value} for name, value in numbers.items()])

    def _summary(self, step: int, values: list[dict[str, Any]]) -> None:
        self._write(step, summary={"value": values})

    def _write(self, step: int, **content: Any) -> None:
        """Append one event; `content` is a field of tensorboard's Event."""
        event = self._event(wall_time=time.time(), step=step, **content)
        self._records.write(event.SerializeToString())
        self._file.flush()


def _markdown(sample: Sample) -> bytes:
    """The three texts as code blocks, in which nothing is markup."""
    texts = {"prompt": sample.prompt, "expected": sample.reference, "answer": sample.answer}
    blocks = [f"**{name}**\n\n" + re.sub("^", "    ", text, flags=re.M) for name, text in texts.items()]
    return "\n\n".join(blocks).encode(errors="replace")  # half a character has no bytes


def _open(section: bool, run: Run) -> Sink | None:
    if not section:
        return None
    try:
        return TensorBoard(run)
    except ModuleNotFoundError:
        run.note("tensorboard is not installed: no event files (pip install tensorboard)")
        return None


BACKEND = Backend("tensorboard", re.compile(r"events\.out\.tfevents\..*"), _open)
