"""A tiny base, a recipe for it and a run of it: what the sweeps damage."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qlora import bundled

WIDTH = 64


def without_forecast() -> None:
    """Leave out the memory forecast in this process and its forks: it takes as long as the steps."""
    patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")).start()


def import_all() -> None:
    """Import what the commands need, once for all forks, and use one thread, on which rounding depends."""
    import torch

    import qlora.inference.load
    import qlora.merging.merge
    import qlora.report.page
    import qlora.training.check
    import qlora.training.train  # noqa: F401

    torch.set_num_threads(1)
    without_forecast()


def tiny_base(folder: Path) -> Path:
    """Write a random Llama of two layers with the bundled tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in bundled.path("bundled/base").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def settings(base: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of a few short steps with dropout and checkpoints, updated by `sections`."""
    recipe: dict[str, Any] = {
        "base": {"model": str(base), "compute_dtype": "float32"},
        "adapter": {"rank": 4, "targets": "all-linear", "dropout": 0.1},
        "data": {
            "source": str(bundled.path("bundled/tickets/train.jsonl")),
            "format": "messages",
            "max_length": 128,
            "limit": 24,
            "held_out": 4,
        },
        "optimizer": {"warmup_steps": 2},
        "training": {
            "max_steps": 6,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "samples": 0,
            "eval_every": 3,
            "save_every": 2,
            "device": "cpu",
        },
        "tracking": {"wandb": {"mode": "disabled"}},
        "output": str(run),
    }
    for name, section in sections.items():
        recipe[name] = {**recipe[name], **section}
    return recipe


def write_recipe(file: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe, as JSON, which is YAML but for the names of two numbers."""
    file.write_text(json.dumps(recipe).replace("Infinity", ".inf").replace("NaN", ".nan"))
    return file


def trained(recipe: Path, *arguments: str) -> None:
    """Train a recipe to its end, in a fork. Raises RuntimeError if it fails."""
    from benchmarks.faults.child import command

    end = command(["train", recipe, "--quiet", *arguments], 300)
    if end.code:
        raise RuntimeError(f"the run that is to be damaged failed: {end.said}")


def result_of(run: Path) -> tuple[bytes, list[dict[str, Any]]] | None:
    """Return the tensors of a run's adapter and its records without times; None if it has no adapter."""
    file = run / "adapter/adapter_model.safetensors"
    if not file.is_file():
        return None
    records = []
    for line in (
        (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").is_file() else ()
    ):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records.append(
                {k: v for k, v in record.items() if k not in ("tokens_per_second", "peak_memory_bytes")}
            )
    return file.read_bytes(), records
