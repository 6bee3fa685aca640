"""Error for an architecture whose memory cannot be forecast, although it may be trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora.errors import ModelError, QloraError, first_line


class NoForecastError(ModelError):
    """A forecast failed. A run does not need it; `estimate` and a memory budget do."""


@contextmanager
def failure_named() -> Iterator[None]:
    """Turn any error that is not for the user into a NoForecastError: unknown architectures can fail in any way."""
    try:
        yield
    except QloraError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise NoForecastError(f"no memory forecast for this architecture: {reason}") from error
