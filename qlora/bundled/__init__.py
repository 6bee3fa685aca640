"""What ships inside the package: a small pretrained base model and a fine-tuning task for it."""

from pathlib import Path


def path(name: str) -> Path:
    """Where a shipped file or folder lies: `path("bundled/base")` and `path("base")` are the same folder.

    The path is not checked: whoever opens it knows best what to say when it is missing.
    """
    return Path(__file__).parent / name.removeprefix("bundled/")
