"""Silences transformers while it builds or loads a model."""

import warnings

from transformers.utils import logging as transformers_logging


class quiet:
    """Silence transformers' progress bars and load reports; qlora prints its own."""

    def __enter__(self) -> None:
        self._level = transformers_logging.get_verbosity()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        transformers_logging.set_verbosity(self._level)
        self._warnings.__exit__(*exc)  # type: ignore[arg-type]
