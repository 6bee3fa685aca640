"""Collects the deprecations that libraries log, which pytest's warning filters do not see."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LIBRARIES = {
    "transformers", "huggingface_hub", "accelerate", "datasets", "peft", "torch", "bitsandbytes", "wandb"
}  # fmt: skip
SPEAKS_OF_THE_END = re.compile(r"deprecat|will be removed|FutureWarning", re.IGNORECASE)


@contextmanager
def heard_deprecations() -> Iterator[list[str]]:
    """Collect the deprecations that these libraries log, also those that a logger's level hides.

    `qlora.model.load` sets transformers' level to ERROR while it loads a model, and transformers' loggers do not pass
    records to the root logger. A handler would miss these records, so the two methods that every record passes through
    are patched.
    """
    heard: list[str] = []
    is_enabled_for, handle = logging.Logger.isEnabledFor, logging.Logger.handle

    def ours_too(logger: logging.Logger, level: int) -> bool:
        return (level >= logging.WARNING and _is_ours(logger)) or is_enabled_for(logger, level)

    def listen(logger: logging.Logger, record: logging.LogRecord) -> None:
        if _is_ours(logger) and SPEAKS_OF_THE_END.search(record.getMessage()):
            heard.append(f"{record.name}: {record.getMessage()}")
        if is_enabled_for(logger, record.levelno):
            handle(logger, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger, "isEnabledFor", ours_too)
        patch.setattr(logging.Logger, "handle", listen)
        yield heard


def say_once_again() -> None:
    """Clear the caches of `warning_once`, so that transformers and accelerate log a warning again."""
    from accelerate.logging import MultiProcessAdapter

    for speaker in (logging.Logger, MultiProcessAdapter):
        speaker.warning_once.cache_clear()  # type: ignore[union-attr]


def _is_ours(logger: logging.Logger) -> bool:
    return logger.name.partition(".")[0] in LIBRARIES
