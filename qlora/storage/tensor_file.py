"""Writes a safetensors file that the same users can read as the files next to it."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write named tensors to a safetensors file, with the permissions that the umask gives to a new file.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    give_usual_permissions(path.parent, path.name)


def give_usual_permissions(folder: Path, name: str = "*.safetensors") -> None:
    """Give files of `folder` called `name` (a glob) the permissions of a new file: those of safetensors are stricter.

    Raises:
        OSError: no file can be made in the folder.
    """
    # The umask itself can only be read by a change of it, which other threads would see
    probe = folder / ".tmp-permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob(name):
        with suppress(OSError):  # disks without permissions
            file.chmod(mode)
