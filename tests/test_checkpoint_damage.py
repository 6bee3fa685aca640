"""Damaged checkpoints: every flipped bit is detected; they are named, skipped and left in place."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints_for_tests import RUN_ID, contents, save

from qlora.errors import ModelError
from qlora.training import checkpoint


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


def newest_with_reasons(run: Path, run_id: str | None = RUN_ID) -> tuple[Path | None, list[str]]:
    reasons: list[str] = []
    return checkpoint.newest(run, run_id=run_id, report=reasons.append), reasons


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(tmp_path: Path, stride: int) -> None:
    folder = save(tmp_path, 1)
    flips = 0
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        good = file.read_bytes()
        for bit in range(0, 8 * len(good), stride):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            assert checkpoint.verify(folder), (file.name, bit)
            flips += 1
        file.write_bytes(good)
    assert checkpoint.verify(folder) == []
    assert flips > 4_000 / stride


def test_every_truncation_is_found_and_reported(two: Path) -> None:
    folder = two / "checkpoints" / "step-000020"
    for name in ("weights.bin", "state.json", "adapter/adapter_config.json", "manifest.json"):
        good = (folder / name).read_bytes()
        for length in range(len(good)):
            (folder / name).write_bytes(good[:length])
            newest, (reason,) = newest_with_reasons(two)
            assert newest is not None
            assert newest.name == "step-000010"
            assert f"file {name}: " in reason
            if name != "manifest.json":
                assert f"expected {len(good)} bytes, found {length}" in reason
        (folder / name).write_bytes(good)
    assert newest_with_reasons(two) == (folder, [])


def swap(folder: Path) -> None:
    shutil.copy(folder.parent / "step-000010" / "weights.bin", folder / "weights.bin")


def other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-000010", folder)


def other_run(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder.parent.parent, 20, run_id="ffff")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "weights.bin").unlink(), "file weights.bin: missing"),
        (lambda f: (f / "manifest.json").unlink(), "file manifest.json: No such file or directory"),
        (lambda f: shutil.rmtree(f / "adapter"), "file adapter/adapter_config.json: missing"),
        (lambda f: (f / "weights.bin").write_bytes(bytes(40)), "file weights.bin: checksum differs"),
        (lambda f: (f / "manifest.json").write_bytes(b""), "file manifest.json: "),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "file manifest.json: "),
        (lambda f: (f / "manifest.json").write_text("[]"), "file manifest.json: "),
        (swap, "file weights.bin: checksum differs"),
        (other_step, "file manifest.json: belongs to step 10"),
        (other_run, "file manifest.json: belongs to run ffff, not 0123abcd"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_named_and_left_in_place(
    two: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = two / "checkpoints" / "step-000020"
    damage(folder)
    after = contents(folder)
    newest, reasons = newest_with_reasons(two)
    assert newest == two / "checkpoints" / "step-000010"
    assert len(reasons) == 1
    assert f"{folder}: {reason}" in reasons[0]
    assert "resuming from step-000010" in reasons[0]
    assert contents(folder) == after


def test_a_stray_file_does_no_harm(two: Path) -> None:
    (two / "checkpoints" / "step-000020" / "notes.txt").write_text("mine")
    assert newest_with_reasons(two) == (two / "checkpoints" / "step-000020", [])


def test_if_all_are_damaged_every_reason_is_shown_and_no_run_starts_over(two: Path) -> None:
    for step in (10, 20):
        (two / "checkpoints" / f"step-{step:06d}" / "weights.bin").unlink()
    with pytest.raises(ModelError) as caught:
        checkpoint.newest(two)
    assert caught.value.exit_code == 4
    for word in (
        "step-000010: file weights.bin: missing",
        "step-000020: file weights.bin: missing",
        "--fresh",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x80\x04K\x01."])
def test_a_file_that_is_not_a_tensor_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.safetensors: cannot be read"):
        checkpoint.load_tensors(file)
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"state\.json: cannot be read"):
        checkpoint.read_state(tmp_path)
