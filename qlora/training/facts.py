"""Collects the facts about a prepared run; `qlora.report.facts` shows and stores them."""

from dataclasses import asdict

import torch
from torch import nn

from qlora.adapter.trained_parts import whole_parameters
from qlora.data import Batches, Dataset, remarks
from qlora.memory import measure
from qlora.memory.run_memory import RunMemory
from qlora.model.head import embedding_of
from qlora.model.load import compute_dtype
from qlora.model.precision import precision_of
from qlora.quantization.expert_stack import expert_stacks
from qlora.quantization.transformers_loader import as_stored
from qlora.recipe import Base, Recipe
from qlora.report.facts import (
    BaseFacts,
    DataFacts,
    DeviceFacts,
    MemoryFacts,
    RunFacts,
    SessionFacts,
    StepFacts,
)
from qlora.runtime import environment
from qlora.runtime.device import device_name
from qlora.training.session import Session


def facts_of(session: Session, resumed_step: int = 0, length_before: int | None = None) -> RunFacts:
    """Return the facts about a run.

    Args:
        session: the prepared run.
        resumed_step: step of the checkpoint that the run continues from.
        length_before: total steps of the run before this session; None for a new run.
    """
    recipe, machine = session.recipe, environment.hardware()
    return RunFacts(
        device=device_facts(session.processes.device, session.processes.count),
        base=_base(recipe, session.model, session.processes.device),
        data=data_facts(recipe, session.dataset),
        steps=step_facts(recipe, session.batches, resumed_step, length_before),
        memory=memory_facts(session.memory),
        output=recipe.output,
        notes=session.notes,
        session=SessionFacts(
            began=environment.now(),
            command=environment.command(),
            versions=environment.versions(),
            hardware=machine,
            stages=dict(session.startup.seconds),
        ),
    )


def data_facts(recipe: Recipe, dataset: Dataset) -> DataFacts:
    """Return the facts about the rows of a run."""
    section = recipe.data
    return DataFacts(
        source=section.names,
        format=", ".join(dict.fromkeys(part.format for part in section.parts)),
        held_out_source=section.held_out if isinstance(section.held_out, str) else None,
        max_length=section.max_length,
        packing=section.packing,
        counts=asdict(dataset.counts),
        remarks=remarks(dataset.counts),
        held_out_sha256=dataset.held_out.sha256 if dataset.counts.held_out else None,
    )


def step_facts(
    recipe: Recipe, batches: Batches, resumed_step: int = 0, length_before: int | None = None
) -> StepFacts:
    """Return the facts about the optimizer steps of a run; the last two arguments as in `facts_of`."""
    settings, training = recipe.optimizer, recipe.training
    total = training.total_steps(batches.steps_per_epoch)
    return StepFacts(
        rows_per_step=min(training.global_batch_size, batches.rows_per_epoch),
        rows_in_last_step=(batches.rows_per_epoch - 1) % training.global_batch_size + 1,
        micro_batch_size=training.micro_batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total,
        resumed_step=resumed_step,
        length_before=None if length_before == total else length_before,
        optimizer=settings.name,
        lr=settings.lr,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        lr_ratio=recipe.adapter.lr_ratio,
    )


def memory_facts(memory: RunMemory) -> MemoryFacts:
    """Return the facts about the memory forecast of a run."""
    forecast = memory.forecast
    return MemoryFacts(None if forecast is None else forecast.total_bytes, memory.note)


def device_facts(device: torch.device, processes: int = 1) -> DeviceFacts:
    """Return the facts about a device that is here, used by a number of processes."""
    host_bytes = environment.hardware()["memory_bytes"]
    return DeviceFacts(
        kind=device.type,
        name=device_name(device),
        memory_bytes=measure.capacity_bytes(device) or host_bytes,
        free_bytes=measure.free_bytes(device),
        processes=processes,
    )


def _base(recipe: Recipe, model: nn.Module, device: torch.device) -> BaseFacts:
    base, adapter = recipe.base, recipe.adapter
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(map(_numbers, model.parameters())) + _embedding_on_host(model)
    packed = [stack for stack in expert_stacks(model).values() if stack.packed]
    everything += sum(stack.numel() - stack.weight.numel() for stack in packed)
    return BaseFacts(
        name=base.model,
        revision=base.revision,
        init=base.init,
        parameters=everything - trained + whole_parameters(model),
        precision=_precision(as_stored(base, model.config)),
        compute_dtype=str(compute_dtype(base, device)).removeprefix("torch."),
        kept=precision_of(model).line() if base.quantization == "nf4" else "",
        method=adapter.summary,
        trained_parameters=trained,
    )


def _numbers(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; one in NF4 stores two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _embedding_on_host(model: nn.Module) -> int:
    """Return the number of weights of an input embedding that is kept on the host, as no parameter of the model."""
    weight = embedding_of(model).weight
    return 0 if isinstance(weight, nn.Parameter) else weight.numel()


def _precision(base: Base) -> str:
    if base.quantization == "none":
        return "not quantized"
    double = " with double quantization" if base.double_quant else ""
    return f"NF4 in blocks of {base.block_size}{double}"
