"""Checkpoint files are found on disk or in the hub's cache, and read by their headers; damage is named."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qlora import bundled
from qlora.adapter.identity import BaseIdentity, checkpoint_digest
from qlora.errors import ModelError
from qlora.storage.safetensors_files import ShardReader, find_checkpoint, stored_tensors

TENSORS = {"b": torch.arange(3.0), "a": torch.arange(4, dtype=torch.int8), "c": torch.ones(2, 2).bfloat16()}


def test_a_header_gives_the_offsets_of_its_tensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    for stored in stored_tensors(tmp_path / "model.safetensors"):
        tensor = TENSORS[stored.name]
        assert content[stored.start : stored.stop] == tensor.view(torch.uint8).numpy().tobytes()
        assert (stored.shape, stored.elements) == (tuple(tensor.shape), tensor.numel())
        assert stored.is_quantized == (stored.name == "a")
    reader = ShardReader(tmp_path)
    assert list(reader) == ["a", "b", "c"]
    assert all(torch.equal(reader[name], tensor) for name, tensor in TENSORS.items())


def test_a_truncated_file_is_named_before_a_tensor_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    content = file.read_bytes()
    for damaged in (content[:-1], content + b"x", content[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged"):
            ShardReader(tmp_path)


def test_the_digest_is_the_same_in_every_version() -> None:
    """Adapters store the digest: with a changed digest they would refuse their own base."""
    file = bundled.path("bundled/base") / "model.safetensors"
    assert checkpoint_digest([file]) == "88cdf90788031e9b0c09591d495a160f"


def test_a_hub_model_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--base" / "snapshots" / commit
    shutil.copytree(bundled.path("bundled/base"), folder)
    assert find_checkpoint("some/base", commit) == folder
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"_name_or_path": "some/base", "_commit_hash": commit})()
    assert BaseIdentity.of(model).weights == checkpoint_digest([folder / "model.safetensors"])
    model.config._commit_hash = commit[::-1]
    assert BaseIdentity.of(model).weights is None
