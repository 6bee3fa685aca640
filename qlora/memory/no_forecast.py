"""Error for an architecture whose memory cannot be forecast, although it may be trained."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, QloraError
from qlora.runtime.fake import failures_unlogged


class NoForecastError(ModelError):
    """A forecast failed. A run does not need it; `estimate` and a memory budget do."""


@contextmanager
def failure_named(kind: str) -> Iterator[None]:
    """Turn any error that is not for the user into a NoForecastError: unknown architectures can fail in any way.

    torch's own message speaks of operators and shapes of a pass that the user did not ask for. So the error says where
    the code failed, and what to do instead; torch's error is its cause.

    Args:
        kind: the architecture, for example `JambaForCausalLM`.
    """
    try:
        with failures_unlogged():
            yield
    except QloraError:
        raise
    except Exception as error:
        raise NoForecastError(
            f"no memory forecast for {kind}: a forecast runs the model on shapes without values, which its code "
            f"does not support ({type(error).__name__} in {_place(error)}). It may train all the same: set "
            "training.max_steps=3, and read peak_memory_bytes in the run's metrics.jsonl"
        ) from error


def kind_of(config: Any) -> str:
    """Return the name of the architecture in a configuration of transformers: its class, or else its type."""
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def _place(error: Exception) -> str:
    """Return file:line of the model's code in which an error arose, or of the last code outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).name.startswith("modeling_")]
    outside = [frame for frame in frames if "torch" not in Path(frame.filename).parts]
    frame = (own or outside or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
