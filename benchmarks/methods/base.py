"""The base that the experiments adapt: the bundled base after reading half of E2E in two other forms.

The bundled base has never read about restaurants and cannot copy a name from a prompt, so a cell of under a minute
could not teach it the task. It first learns, in one pass over the half of the training set that fine-tuning does not
see, to turn sentences into MRs, and lists of facts in another notation into sentences. It then knows the words and
copies names, as a large pretrained model does, and MR to sentence is still new to it. The weights are stored in a cache
folder and not in the repository.
"""

import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.methods import simulated
from benchmarks.methods.e2e import E2E, base_rows
from qlora.recipe import Recipe
from qlora.storage.folders import lock
from qlora.training.train import train


def recipe(output: Path, epochs: int) -> Recipe:
    """Return the recipe of the base: full fine-tuning on all tokens of the rows."""
    settings = {
        "base": {"model": "bundled/base", "quantization": "none"},
        "adapter": {"method": "full"},
        "data": {
            "source": "e2e-other-forms", "format": "prompt-completion", "held_out": 100, "max_length": 256,
            "train_on": "all",
        },
        "training": {
            "epochs": epochs, "global_batch_size": 16, "micro_batch_size": 16, "activation_checkpointing": "none",
            "max_grad_norm": 1.0, "samples": 3, "eval_every": 400, "save_every": 100,
        },
        "optimizer": {
            "name": "adamw", "lr": 2e-3, "schedule": "cosine", "warmup_steps": 50, "weight_decay": 0.1,
            "betas": [0.9, 0.95],
        },
        "tracking": {"wandb": {"mode": "disabled"}},
        "output": str(output),
    }  # fmt: skip
    return Recipe.from_dict(settings, "methods-base")


def make(data: E2E, cache: Path, epochs: int = 1) -> Path:
    """Return the folder of the base; train it first if the cache has none. An interrupted training is resumed."""
    folder = cache / "16-bit"
    with lock(cache, wait=True):
        if not folder.exists():
            outcome = train(recipe(cache / "base-run", epochs), rows=base_rows(data.base), resume=True)
            if outcome.result is None:
                raise SystemExit("the base is unfinished; the same command resumes its training")
            in_16_bits(outcome.result, folder)
    return folder


def in_16_bits(model: Path, to: Path) -> None:
    """Write a copy of the model with weights in bf16, as bases are published."""
    draft = to.with_name(f".{to.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(model, draft)
    tensors = load_file(draft / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        draft / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((draft / "config.json").read_text()) | {"dtype": "bfloat16"}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    draft.rename(to)


def weights_folder(cache: Path, name: str) -> Path:
    """Return the folder of the base with these weights; simulated ones are made at their first use."""
    folder = cache / name
    with lock(cache, wait=True):
        if not folder.exists():
            simulated.write(cache / "16-bit", name, folder)
    return folder


def digest(cache: Path) -> str:
    """Return the first digits of the SHA-256 of the base's weights, which every record carries."""
    content = (cache / "16-bit/model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]
