"""Files inside the package: a small pretrained base model, and a fine-tuning task for it."""

from pathlib import Path


def path(name: str) -> Path:
    """Return the path of a bundled file or folder; `path("bundled/base")` and `path("base")` are the same.

    The path need not exist: the caller reports a missing file in its own words.
    """
    return Path(__file__).parent / name.removeprefix("bundled/")
