"""Files of tensors have the permissions of their neighbours, and an error of the disk keeps its own reason."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qlora.adapter import LoraSpec, adapt, save_adapter
from qlora.errors import SaveError
from qlora.storage import tensor_file
from qlora.storage.folders import save_errors
from qlora.storage.safetensors_files import ShardWriter
from qlora.training import checkpoint


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_tensors_can_be_read_by_those_whom_the_umask_allows(tmp_path: Path, umask: int) -> None:
    for name, spec, component in (
        ("a", LoraSpec(rank=2), "unet"),
        ("b", LoraSpec(rank=2, init="pissa"), None),
    ):
        network = adapt(nn.Sequential(nn.Linear(8, 4)), spec)
        save_adapter(network, tmp_path / name, diffusers=component)
    checkpoint.save_tensors(tmp_path / "optimizer.safetensors", {"m": torch.ones(3)})
    with ShardWriter(tmp_path, shard_bytes=8) as writer:
        writer.add("a", torch.ones(3))
        writer.add("b", torch.ones(3))
    files = [*tmp_path.rglob("*.*")]
    assert sum(file.suffix == ".safetensors" for file in files) == 7
    assert {file: stat.S_IMODE(file.stat().st_mode) for file in files} == dict.fromkeys(files, 0o666 & ~umask)


def test_a_model_of_transformers_gets_the_same_permissions(tmp_path: Path, umask: int) -> None:
    for name in ("model.safetensors", "other.txt"):
        (tmp_path / name).touch(0o600)
    tensor_file.give_usual_permissions(tmp_path)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"model.safetensors": 0o666 & ~umask, "other.txt": 0o600}


def test_a_disk_without_permissions_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuses)
    tensor_file.write(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert load_file(tmp_path / "x.safetensors")["a"].sum() == 2


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EFBIG, False), (None, False)])
def test_only_a_full_disk_is_reported_as_full(tmp_path: Path, number: int | None, full: bool) -> None:
    text = "invalid" if number is None else f"I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(SaveError) as caught, save_errors(tmp_path / "x"):
        raise SafetensorError(text)
    assert (text if number is None else os.strerror(number)) in str(caught.value)
    assert ("GiB free" in str(caught.value)) == full
