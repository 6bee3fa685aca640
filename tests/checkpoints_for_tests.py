"""Small checkpoints for the tests to write, damage and compare."""

from pathlib import Path

from qlora.training import checkpoint

RUN_ID = "0123abcd"


def save(run: Path, step: int, run_id: str = RUN_ID) -> Path:
    with checkpoint.writing(run, step, run_id) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text('{"r": 8}\n')
        (folder / "weights.bin").write_bytes(bytes(range(step % 200, step % 200 + 40)))
        checkpoint.write_state(folder, {"step": step})
    return run / "checkpoints" / f"step-{step:06d}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hidden(run: Path) -> list[str]:
    return [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
