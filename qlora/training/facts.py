"""Collects the facts about a prepared run; `qlora.report.facts` shows and stores them."""

from dataclasses import asdict

import torch
from torch import nn

from qlora.data import remarks
from qlora.memory import measure
from qlora.model.load import compute_dtype
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
from qlora.runtime.distributed import DataParallel
from qlora.training.session import Session


def facts_of(session: Session, resumed_step: int = 0, length_before: int | None = None) -> RunFacts:
    """Return the facts about a run.

    Args:
        session: the prepared run.
        resumed_step: step of the checkpoint that the run continues from.
        length_before: total steps of the run before this session; None for a new run.
    """
    recipe, dataset, batches = session.recipe, session.dataset, session.batches
    settings, training = recipe.optimizer, recipe.training
    machine = environment.hardware()
    return RunFacts(
        device=_device(session.processes, machine["memory_bytes"]),
        base=_base(recipe, session.model, session.processes.device),
        data=DataFacts(
            source=recipe.data.names,
            format=recipe.data.format,
            held_out_source=recipe.data.held_out if isinstance(recipe.data.held_out, str) else None,
            max_length=recipe.data.max_length,
            packing=recipe.data.packing,
            counts=asdict(dataset.counts),
            remarks=remarks(dataset.counts),
        ),
        steps=StepFacts(
            rows_per_step=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            steps_per_epoch=batches.steps_per_epoch,
            total_steps=session.total_steps,
            resumed_step=resumed_step,
            length_before=None if length_before == session.total_steps else length_before,
            optimizer=settings.name,
            lr=settings.lr,
            schedule=settings.schedule,
            warmup_steps=settings.warmup_steps,
        ),
        memory=MemoryFacts(
            None if session.memory.forecast is None else session.memory.forecast.total_bytes,
            session.memory.note,
        ),
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


def _device(processes: DataParallel, host_bytes: int) -> DeviceFacts:
    device = processes.device
    cuda = device.type == "cuda"
    return DeviceFacts(
        kind=device.type,
        name=torch.cuda.get_device_name(device) if cuda else f"CPU, {environment.cpu_name()}",
        memory_bytes=measure.capacity_bytes(device) or host_bytes,
        free_bytes=measure.free_bytes(device),
        processes=processes.count,
    )


def _base(recipe: Recipe, model: nn.Module, device: torch.device) -> BaseFacts:
    base, adapter = recipe.base, recipe.adapter
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(map(_numbers, model.parameters())) + _embedding_on_host(model)
    return BaseFacts(
        name=base.model,
        revision=base.revision,
        init=base.init,
        parameters=everything - trained if adapter.facts.frozen_base else everything,
        precision=_precision(base),
        compute_dtype=str(compute_dtype(base, device)).removeprefix("torch."),
        kept="",
        method=adapter.summary,
        trained_parameters=trained,
    )


def _numbers(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; one in NF4 stores two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _embedding_on_host(model: nn.Module) -> int:
    """Return the number of weights of an input embedding that is kept on the host, as no parameter of the model."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return 0 if isinstance(weight, nn.Parameter) else weight.numel()


def _precision(base: Base) -> str:
    if base.quantization == "none":
        return "not quantized"
    double = " with double quantization" if base.double_quant else ""
    return f"NF4 in blocks of {base.block_size}{double}"
