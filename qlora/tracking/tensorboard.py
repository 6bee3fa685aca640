"""TensorBoard: a copy of the record as event files in `<run>/tensorboard`, if the package is installed.

Every event is written before the call returns. `tensorboard`'s own writer buffers events for up to two minutes. A kill
would then lose steps before the newest checkpoint, and a resumed run does not take those again.

A resumed run starts a new file. Its first event makes TensorBoard drop later steps from the earlier files
(SummaryWriter calls this purge_step), so that every step is shown once.
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
    """Writes a new event file of the run."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Numbered, not timed: TensorBoard reads the files in the order of their names, and a clock can be set back.
        number = 1 + len(list(folder.glob("events.*")))
        self._file = (folder / f"events.out.tfevents.{number:010}").open("ab")
        self._event, self._records = Event, RecordWriter(self._file)
        self._step = run.resume_step
        # A run resumed without a checkpoint repeats step 0, its first evaluation.
        first = run.resume_step + 1 if run.resume_step else 0
        self._write(first, file_version="brain.Event:2")
        self._write(first, session_log={"status": "START"})

    def step(self, record: Metrics) -> None:
        """Write each number of the record under its name, at the record's step."""
        self._step = record["step"]
        self._numbers({name: value for name, value in record.items() if name != "step"})

    evaluation = step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Write prompt, expected answer and answer of each sample as text."""
        for number, sample in enumerate(samples, 1):
            text = {"dtype": "DT_STRING", "string_val": [_markdown(sample)], "tensor_shape": {}}
            shown = {"plugin_data": {"plugin_name": "text"}}
            self._summary(step, [{"tag": f"samples/{number}", "metadata": shown, "tensor": text}])

    def memory(self, content: Metrics, picture: Path) -> None:
        """Write the memory totals and the picture at the last step."""
        self._numbers(memory_totals(content))
        png = picture.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # from the IHDR chunk
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
    """Format the sample's texts as code blocks, so that nothing in them is read as markup."""
    texts = {"before": sample.before} if sample.before else {}
    texts |= {"prompt": sample.prompt, "expected": sample.reference, "answer": sample.answer}
    blocks = [f"**{name}**\n\n" + re.sub("^", "    ", text, flags=re.M) for name, text in texts.items()]
    return "\n\n".join(blocks).encode(errors="replace")  # a lone surrogate cannot be encoded


def _open(section: bool, run: Run) -> Sink | None:
    if not section:
        return None
    try:
        return TensorBoard(run)
    except ModuleNotFoundError:
        run.note("tensorboard is not installed, so no event files are written; run `pip install tensorboard`")
        return None


BACKEND = Backend("tensorboard", re.compile(r"events\.out\.tfevents\..*"), _open)
