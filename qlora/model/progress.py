"""Progress of loading a base: the hub's bars for a download, then a count of the loaded tensors."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from transformers.utils.logging import set_tqdm_hook

from qlora.model.load import checkpoint_folder
from qlora.model.locate import locate
from qlora.recipe import Base
from qlora.runtime.progress import Progress

LOADING = "Loading weights"
"""title of transformers' bar over the tensors of a checkpoint"""


def is_on_hub(base: Base) -> bool:
    """Return True if the weights of `base` come from the hub, or from the hub's cache on this machine."""
    return base.init == "pretrained" and not Path(locate(base)).exists()


def download(base: Base) -> Path:
    """Download the files of a base that the hub's cache on this machine lacks, and return their folder.

    On a terminal the hub shows its progress bars; in a log file it shows none.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and the cache has no copy.
    """
    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # transformers switches them off for as long as it loads a config or a model
    try:
        return checkpoint_folder(base)
    finally:
        disable_progress_bars()


@contextmanager
def tensors_counted(progress: Progress | None) -> Iterator[None]:
    """Report the tensors that transformers loads (and quantizes) within this context: `tensor 12 of 291`."""
    if progress is None:
        yield
        return

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        if settings.get("desc") == LOADING and args:
            return _counted(args[0], progress)
        return factory(*args, **settings)

    before = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _counted(items: Collection[Any], progress: Progress) -> Iterator[Any]:
    for number, item in enumerate(items, 1):
        progress(f"loading the base: tensor {number:,} of {len(items):,}")
        yield item
