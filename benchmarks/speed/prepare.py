"""Prepare the common start of all contenders: one NF4 checkpoint, one adapter, one workload.

    python -m benchmarks.speed.prepare SETTING.json

Runs in a separate process. The checkpoint is made once and kept in the cache. It has random weights from a seed, in
the layout in which transformers saves a model quantized with bitsandbytes, so every trainer loads it as its
documentation describes. A mixture is not quantized in that file, because transformers writes no experts in NF4: every
trainer quantizes what it can as it reads it. The experts have values that NF4 holds, so that whether a trainer
quantizes them or not changes no loss. B of the adapter is not zero, so that no gradient is zero at the first step.
Prints one JSON object: the paths, and the values chosen for `auto`.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed import workload
from benchmarks.speed.job import Job
from benchmarks.speed.presets import Preset, Shape
from benchmarks.speed.quantization import quantization
from qlora import bundled
from qlora.model.load import compute_dtype, load_base
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_parameters, rounded
from qlora.recipe import Base
from qlora.storage.folders import replacing


@dataclasses.dataclass(frozen=True)
class Setting:
    """Setting of one comparison: architecture, tokens and hyperparameters of all contenders."""

    preset: Preset
    steps: int
    rank: int = 16
    alpha: float = 16.0
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    seed: int = 0
    gsm8k: str | None = None
    """JSON Lines with `question` and `answer`; None for dense random tokens"""
    tokenizer: str | None = None
    cache: str = ""

    def to_json(self) -> str:
        """Return the setting as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, path: str) -> "Setting":
        """Read a setting from a JSON file."""
        settings = json.loads(Path(path).read_text())
        return cls(**settings | {"preset": Preset(**settings["preset"])})


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Paths of the common files, and the values chosen for `auto`."""

    base: str
    adapter: str
    workload: str
    device: str
    dtype: str
    tokens: list[int]
    """tokens of each step"""
    supervised: list[int]
    """tokens of each step that have a label"""
    lengths: list[list[int]]
    """tokens of each document of each step"""

    def job(self, setting: Setting, *, warmup: int = 0, lr: float = 2e-4, flags: tuple[str, ...] = ()) -> Job:
        """Return the job of a contender."""
        preset = setting.preset
        return Job(
            base=self.base,
            adapter=self.adapter,
            workload=self.workload,
            device=self.device,
            dtype=self.dtype,
            rank=setting.rank,
            alpha=setting.alpha,
            warmup=warmup,
            micro_batch=preset.sequences if setting.gsm8k is None else preset.micro_batch,
            max_length=preset.length,
            lr=lr,
            max_grad_norm=1.0,
            flags=flags,
        )


def prepare(setting: Setting) -> Prepared:
    """Create the files that are not in the cache yet, and return their paths."""
    device = setting.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(Base(model="bundled/base", compute_dtype=setting.dtype), torch.device(device))
    cache = Path(setting.cache)
    cache.mkdir(parents=True, exist_ok=True)
    base = _checkpoint(setting, cache, device, dtype)
    adapter = _adapter(setting, cache, base)
    tokens = _tokens(setting)
    key = _key(
        tokens.lengths(), setting.seed, setting.gsm8k, setting.tokenizer, setting.preset.config["vocab_size"]
    )
    file = cache / f"workload-{key}.safetensors"
    tokens.save(file)
    return Prepared(
        base=str(base),
        adapter=str(adapter),
        workload=str(file),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens.tokens(),
        supervised=tokens.supervised(),
        lengths=tokens.lengths(),
    )


def _checkpoint(setting: Setting, cache: Path, device: str, dtype: torch.dtype) -> Path:
    """Return the folder of the NF4 checkpoint; create it if it is not in the cache."""
    config = setting.preset.config
    name = (
        f"base-{setting.preset.name}-{_key(config, setting.seed, str(dtype), torch.__version__, 'tokenizer')}"
    )
    if (cache / name).is_dir():
        return cache / name
    with replacing(cache, name) as folder:
        (folder / "config.json").write_text(json.dumps(config))
        if Shape.of(config).experts:
            _save_mixture(folder, setting.seed, dtype)
            return cache / name
        name_of_dtype: Any = str(dtype).removeprefix("torch.")
        base = Base(model=str(folder), init="synthetic", compute_dtype=name_of_dtype)
        model = load_base(base, device, seed=setting.seed)
        for module in model.modules():
            if nf4.is_nf4(module) and (quant_state := nf4.quant_state(module)) is not None:
                # bitsandbytes' backward dequantizes to this dtype. Checkpoints quantized from weights in the compute
                # dtype have that dtype here; any other costs a second conversion
                quant_state.dtype = dtype
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if config.get("tie_word_embeddings"):
            del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        changes = {
            "dtype": str(dtype).removeprefix("torch."),
            "quantization_config": quantization(dtype).to_dict(),
        }
        (folder / "config.json").write_text(json.dumps(config | changes, indent=1, default=str))
        for file in bundled.path("bundled/base").glob("tokenizer*"):  # Unsloth loads one with the model
            shutil.copy(file, folder)
    return cache / name


def _save_mixture(folder: Path, seed: int, dtype: torch.dtype) -> None:
    """Save the mixture of the config in `folder` with random weights; the experts have values of NF4."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for _, weight in expert_parameters(model):
            weight.copy_(rounded(weight))
    model.to(dtype).save_pretrained(folder)


def _adapter(setting: Setting, cache: Path, base: Path) -> Path:
    """Save A and B of every linear layer, in bfloat16 so that every contender starts from the same values.

    Those of experts are in PEFT's layout: the A of one expert after another, and column r of all B side by side.
    """
    file = cache / f"adapter-{_key(base.name, setting.rank)}.safetensors"
    shape = Shape.of(setting.preset.config)
    generator = torch.Generator().manual_seed(setting.seed + 1)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for linear in shape.linears():
            rank = linear.rank(setting.rank) * linear.experts
            if rank == 0:
                continue
            name = f"model.layers.{layer}.{linear.block}.{linear.projection}"
            a = torch.empty(rank, linear.inputs).uniform_(-1, 1, generator=generator) / linear.inputs**0.5
            b = torch.empty(linear.outputs, rank).normal_(0, 0.02, generator=generator)
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a.bfloat16(), b.bfloat16()
    save_file(tensors, file)
    return file


def _tokens(setting: Setting) -> workload.Workload:
    preset = setting.preset
    vocabulary = preset.config["vocab_size"]
    if setting.gsm8k is None:
        return workload.dense(setting.steps, preset.sequences, preset.length, vocabulary, setting.seed)
    tokenizer = Path(setting.tokenizer) if setting.tokenizer else bundled.path("bundled/base")
    return workload.question_answer(
        Path(setting.gsm8k),
        tokenizer,
        steps=setting.steps,
        documents=preset.documents,
        micro_batch=preset.micro_batch,
        max_length=preset.length,
        vocabulary=vocabulary,
        seed=setting.seed,
    )


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:10]


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(prepare(Setting.read(sys.argv[1])))))
