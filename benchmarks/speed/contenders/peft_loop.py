"""Shared by the PEFT contenders: model loading, the common initial adapter, and a plain training loop."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed.job import Job
from benchmarks.speed.meter import Meter
from benchmarks.speed.presets import Shape
from benchmarks.speed.quantization import quantization
from benchmarks.speed.workload import IGNORE_INDEX, Document, Workload, micro_batches, padded

PREFIX = "base_model.model."


def load(job: Job) -> nn.Module:
    """Load the NF4 checkpoint with transformers; of a mixture, quantize the linear layers, which leaves the experts."""
    dtype = getattr(torch, job.dtype)
    stored: Any = AutoConfig.from_pretrained(job.base)
    settings = {} if hasattr(stored, "quantization_config") else {"quantization_config": quantization(dtype)}
    model = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=dtype, device_map={"": job.device}, **settings
    )
    model.config.use_cache = False
    return model


def lora_config(job: Job) -> LoraConfig:
    """Return the settings for LoRA on every linear layer and on all experts, without dropout."""
    linears = shape_of(job).linears()
    experts = [linear for linear in linears if linear.experts > 1]
    attention = [linear.projection for linear in linears if linear.block == "self_attn"]
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=attention if experts else "all-linear",
        target_parameters=[f"{linear.block}.{linear.projection}" for linear in experts] or None,
        rank_pattern={linear.projection: linear.rank(job.rank) for linear in experts},
        bias="none",
        task_type="CAUSAL_LM",
    )


def shape_of(job: Job) -> Shape:
    """Return the dimensions of the base."""
    return Shape.of(json.loads((Path(job.base) / "config.json").read_text()))


def adapted(model: nn.Module, job: Job, dtype: torch.dtype | None = None) -> nn.Module:
    """Add the common initial adapter to the model; A and B in `dtype`, or in PEFT's own choice if None."""
    model = get_peft_model(model, lora_config(job))
    start_from(model, job, dtype)
    return model.train()


def start_from(model: nn.Module, job: Job, dtype: torch.dtype | None = None) -> None:
    """Set A and B to their common initial values, converted to `dtype` if given."""
    parameters = adapter(model)
    with torch.no_grad():
        for name, value in load_file(job.adapter).items():
            if dtype is not None:
                parameters[name].data = parameters[name].data.to(dtype)
            parameters[name].copy_(value)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by their names in the job's file."""
    wrapped = {
        f"{name}.": module for name, module in model.named_modules() if isinstance(module, ParamWrapper)
    }
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        wrapper, _, kind = name.partition("lora_")
        if wrapper in wrapped:  # projections of experts are wrapped one around another
            wrapper = wrapper.replace("base_layer.", "") + wrapped[wrapper].parameter_name + "."
        named[job_name(f"{wrapper}lora_{kind}")] = parameter
    return named


def job_name(name: str) -> str:
    """Convert `base_model.model.<layer>.lora_A.default.weight` to `<layer>.lora_a`."""
    layer, _, kind = name.split(PREFIX, 1)[-1].removesuffix(".default.weight").rpartition(".")
    return f"{layer}.{kind.lower()}"


def training_loop(
    model: nn.Module,
    job: Job,
    meter: Meter,
    steps: Workload,
    optimizer: torch.optim.Optimizer,
    *,
    mask: bool,
    multiple: int = 1,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Train every step: forward and backward over its padded micro-batches, clip, update.

    The loss of a step is the mean over its supervised tokens (`num_items_in_batch` of transformers).

    Args:
        model: The model with its adapter.
        job: The common settings.
        meter: Records loss, gradient norm and positions of each step.
        steps: The documents of each step.
        optimizer: Updates the trainable parameters.
        mask: True to pass an attention mask. A causal model needs none for padding on the right.
        multiple: Pads row lengths to a multiple of this number, so that fewer shapes are compiled.
        precision: Context of the forward pass, such as torch.autocast.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    meter.begin()
    for documents in steps.steps:
        supervised = sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
        total, positions = torch.zeros((), device=job.device), 0
        for batch in micro_batches(documents, job.micro_batch):
            inputs = {key: value.to(job.device) for key, value in inputs_of(batch, mask, multiple).items()}
            positions += inputs["input_ids"].numel()
            with precision():
                loss = model(**inputs, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()
        meter.step(loss_value, norm_value, positions)


def inputs_of(batch: Sequence[Document], mask: bool, multiple: int = 1) -> dict[str, Tensor]:
    """Return the arguments of the model's forward for a micro-batch."""
    inputs = padded(batch)
    width = inputs["input_ids"].shape[1]
    extra = -width % multiple
    if extra:
        fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
        inputs = {k: nn.functional.pad(v, (0, extra), value=fill[k]) for k, v in inputs.items()}
    if not mask:
        del inputs["attention_mask"]
    return inputs
