"""Memory forecast of a run, part by part, from its recipe and its model's config.json.

The training step itself (`objective.step`) runs under FakeTensorMode: no storage, no weights, no GPU. Its allocations
are counted as in a measurement (`live.py`). Of equal layers only a few run, and their part of the trace is repeated
(`repeat.py`). Constants are added for memory that is not in tensors: the CUDA context and the allocator's slack.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.adapter.trained_parts import whole_parameters
from qlora.data import Batch
from qlora.memory import inventory
from qlora.memory.architecture import Architecture, can_be_shortened, dtype_on
from qlora.memory.fake_tensors import MetaKernels, as_packed, faked, keep_all_layers
from qlora.memory.inventory import Row, Rows, bytes_by_part
from qlora.memory.layer_kinds import shortened
from qlora.memory.layer_marks import Call, alike, layers_marked
from qlora.memory.live import LiveBytes, Mark, Trace
from qlora.memory.no_forecast import failure_named
from qlora.memory.parts import PARTS
from qlora.memory.repeat import repeat, typical
from qlora.memory.update_trace import trace_of_update
from qlora.memory.workload import Workload
from qlora.model.checkpointing import decoder_layers
from qlora.model.head import embedding_of
from qlora.model.prepare import apply_checkpointing, build, checkpointed
from qlora.model.varlen_attention import read_documents
from qlora.objective import objective_of
from qlora.objective.step import accumulate, evaluate
from qlora.optim import Optimizer
from qlora.quantization.expert_stack import is_experts
from qlora.recipe import Checkpointing, Recipe
from qlora.runtime.fake import FakeTensors
from qlora.runtime.phases import Phase, announce

NEIGHBOURS = 1
"""layers before and after a layer whose recomputation decides its part of the trace"""

NEIGHBOURS_OFFLOADED = 2
"""the same with offloaded inputs: an input goes to the host as the next layer begins, and the first input, the
embeddings, also stays on the GPU"""

CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20
"""torch gives cuBLAS 32 MiB on Hopper (8 MiB on older GPUs) for each of the two threads that multiply: forward and
backward"""

DEVICE_CONTEXT_BYTES = 550 * 10**6
"""CUDA context with the kernels of torch and bitsandbytes; assumed, not measured yet"""

FRAGMENTATION_STATIC, FRAGMENTATION_TRANSIENT = 0.006, 0.09
"""memory that torch's allocator reserves beyond live tensors (`benchmarks/null_gpu`): gaps left by loading the model,
as a share of the model; gaps between the tensors of the layer in flight, as a share of these tensors. Saved activations
leave almost no gaps"""

_PERMANENT = (
    "base_nf4",
    "quantization_statistics",
    "base_unquantized",
    "adapters",
    "gradients",
    "optimizer_state",
)
_TEMPORARY = ("working_set", "logits_and_loss", "dequantization")

Fake = Callable[[Tensor], Tensor]
"""real tensor -> fake tensor"""

_COLUMN = {part: index for index, part in enumerate(PARTS)}


@dataclass(frozen=True)
class Forecast:
    """Forecast memory of a run."""

    trace: Trace
    batch: Batch
    """the micro-batch with the highest peak"""
    layers: int
    checkpointed_layers: int
    checkpointed_mlps: int
    """further layers, of which only the MLP is recomputed"""
    loss_chunk: int
    host_bytes: int
    """host memory used by CPU offload; paged optimizer state, which can move to the host, is not counted"""
    parameters: int
    """parameters of the whole model, adapters not counted"""
    trained_parameters: int
    adapter_parameters: int
    """of these, those of the adapter itself, without what is trained beside it"""

    @property
    def total_bytes(self) -> int:
        """Live bytes at the peak."""
        return int(self.trace.totals.max())


def forecast(recipe: Recipe, workload: Workload, arch: Architecture, *, cuda: bool) -> Forecast:
    """Forecast the live bytes of an optimizer step and an evaluation on the largest batches of a run.

    Args:
        recipe: the recipe.
        workload: the largest batches of the run; only the shapes of their tensors are used.
        arch: architecture of the recipe's base.
        cuda: True for a GPU, False for this machine's CPU.

    >>> forecast(recipe, assumed(recipe), architecture(recipe, cuda=True), cuda=True).total_bytes
    """
    return Forecaster(arch, cuda=cuda).forecast(recipe, workload)


class _LayersDifferError(Exception):
    """Layers of a kind do not do the same, so one of them cannot represent another."""


class Forecaster:
    """Makes forecasts for one architecture; caches the models and traces that forecasts share.

    Plans share their traces if they differ in how many layers are recomputed, but not in whether any are. So a search
    over all plans makes only a few traces.

    >>> forecaster = Forecaster(architecture(recipe, cuda=True), cuda=True)
    >>> [forecaster.forecast(recipe, resized(workload, rows=rows)).total_bytes for rows in (1, 2, 4)]
    """

    def __init__(self, arch: Architecture, *, cuda: bool) -> None:
        self.arch, self.cuda = arch, cuda
        self._fakes = FakeTensors(cuda=cuda)
        self._models: dict[Hashable, tuple[nn.Module, Optimizer]] = {}
        self._short: dict[Hashable, bool] = {}
        self._all_layers = False
        self._traces: dict[Hashable, Trace] = {}
        self._updates: dict[Hashable, tuple[Row, Rows]] = {}

    def forecast(self, recipe: Recipe, workload: Workload) -> Forecast:
        """Forecast like the function `forecast`. The recipe's base and adapter must be those of the architecture."""
        with failure_named(type(self.arch.model).__name__):
            return self._forecast(recipe, workload)

    def _forecast(self, recipe: Recipe, workload: Workload) -> Forecast:
        arch, cuda = self.arch, self.cuda
        whole, mlps = checkpointed(recipe, arch.layers)
        with self._fakes.made() as fake, torch.random.fork_rng([]):
            try:
                frozen, batch, step, evaluation = self._traced(recipe, whole, mlps, workload, fake)
            except _LayersDifferError:
                self._all_layers = True
                frozen, batch, step, evaluation = self._traced(recipe, whole, mlps, workload, fake)
            optimizer_state, update = self._update(recipe)
        trace = _joined(step, update, evaluation)
        rows = trace.parts + frozen + optimizer_state
        if cuda:
            rows = rows + _not_in_tensors(rows, offload=recipe.training.activation_offloading)
        trained = sum(parameter.numel() for parameter in trainable_parameters(arch.model).values())
        adapted = nn.ModuleList(AdaptedLayer.of(arch.model).values())
        total = sum(parameter.numel() for parameter in arch.model.parameters())
        return Forecast(
            Trace(rows, trace.marks),
            batch=batch,
            layers=arch.layers,
            checkpointed_layers=whole,
            checkpointed_mlps=mlps,
            loss_chunk=arch.loss_chunk(recipe),
            host_bytes=_host_bytes(recipe, workload.train, arch, whole) if cuda else 0,
            parameters=total - trained + whole_parameters(arch.model),
            trained_parameters=trained,
            adapter_parameters=sum(p.numel() for p in trainable_parameters(adapted).values()),
        )

    def _traced(
        self, recipe: Recipe, whole: int, mlps: int, workload: Workload, fake: Fake
    ) -> tuple[Row, Batch, Trace, Trace | None]:
        """Return the frozen bytes of the model and what `_passes` returns, from a few layers if these represent all."""
        kept, copies = self._kept(recipe, whole, mlps)
        full, mlp = (sum(n < end for n in kept) for end in (whole, whole + mlps))
        small = _with_checkpointing(recipe, full, mlp - full)
        model, optimizer = self._few_layers(small, kept)
        return _frozen(model, copies), *self._passes(model, optimizer, workload, fake, small, kept, copies)

    def _kept(self, recipe: Recipe, whole: int, mlps: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the layers that run, and for each layer of the model the place of the one that represents it.

        The first `whole` layers are recomputed as a whole, the next `mlps` in their MLP.
        """
        own = self.arch.shapes.kinds()
        if self._all_layers:
            return (tuple(range(len(own))),) * 2
        offloaded = self.cuda and recipe.training.activation_offloading
        neighbours = NEIGHBOURS_OFFLOADED if offloaded else NEIGHBOURS
        modes = tuple((number < whole, number < whole + mlps) for number in range(len(own)))
        kept, copies = typical(own, modes, neighbours)
        if len(kept) == len(own):
            return kept, kept
        of_kept = tuple(own[layer] for layer in kept)
        if of_kept not in self._short:
            self._short[of_kept] = can_be_shortened(self.arch, recipe, kept, cuda=self.cuda)
        return (kept, copies) if self._short[of_kept] else (tuple(range(len(own))),) * 2

    def _few_layers(self, recipe: Recipe, layers: tuple[int, ...]) -> tuple[nn.Module, Optimizer]:
        """Return a model of some of the layers with the recipe's checkpointing, and its optimizer.

        A model of which no layers are known, such as CTRL, is returned as a whole.
        """
        parts = recipe.base, recipe.adapter, recipe.optimizer
        training = recipe.training
        own = self.arch.shapes.kinds()
        kinds = tuple(own[layer] for layer in layers)
        key = kinds, training.accumulates, training.router_loss, *(part.model_dump_json() for part in parts)
        if key not in self._models:
            dtype = str(dtype_on(recipe, self.cuda)).removeprefix("torch.")
            stored = self.arch.stored(recipe.base)
            base = stored.model_copy(update={"init": "synthetic", "compute_dtype": dtype})
            synthetic = recipe.model_copy(update={"base": base})
            config = self.arch.config
            few = shortened(config, layers) if len(layers) < self.arch.layers else config
            self._models[key] = build(synthetic, "cpu", config=few)
            if not self.arch.padded:
                read_documents(self._models[key][0], recipe.data.max_length)
            keep_all_layers(self._models[key][0])
        apply_checkpointing(self._models[key][0], recipe)
        return self._models[key]

    def _passes(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        workload: Workload,
        fake: Fake,
        recipe: Recipe,
        kept: Sequence[int],
        copies: Sequence[int],
    ) -> tuple[Batch, Trace, Trace | None]:
        """Return the micro-batch with the highest peak, the trace of its step and the trace of an evaluation.

        The model has the layers `kept`; `copies` says which of them represents each layer (see `repeat`). Weights,
        adapters, gradients and optimizer state are not part of the traces.
        """
        objective = objective_of(recipe)
        kinds = self.arch.shapes.kinds()
        course = METHODS[recipe.adapter.method].course(model, recipe.adapter, 1)

        def step(batch: Batch) -> None:
            optimizer.zero_grad()
            accumulate(model, [batch], objective, seed=0, step=0, penalty=course.penalty)

        def to_loss(batch: Batch) -> None:
            with announce(Phase.FORWARD):
                objective.loss(model, batch)

        def evaluation(batch: Batch) -> None:
            evaluate(model, [batch], objective)

        def trace(batch: Batch, run: Callable[[Batch], object]) -> Trace:
            # An evaluation keeps nothing of a layer, so it is the same however many layers are recomputed
            recomputed = None if run is evaluation else (recipe.training.activation_checkpointing, id(model))
            rest = _with_checkpointing(recipe, 0, 0).model_dump_json()
            key = rest, recomputed, _shapes(batch), run.__name__
            if key not in self._traces:
                self._traces[key], calls = _trace(model, optimizer, batch, run, fake)
                if len(kept) < len(kinds) and run is step and not alike(calls, [kinds[n] for n in kept]):
                    raise _LayersDifferError
            return self._traces[key]

        def whole(trace: Trace) -> Trace:
            return repeat(trace, copies)

        batch, most = workload.train, whole(trace(workload.train, step))
        # The densest micro-batch has fewer tokens than the largest, so only its loss can need more memory: first trace
        # no more than the forward pass and the loss
        dense = workload.densest
        if dense is not None and whole(trace(dense, to_loss)).totals.max() > most.totals.max():
            batch, most = dense, whole(trace(dense, step))
        evaluated = workload.evaluation
        return batch, most, None if evaluated is None else trace(evaluated, evaluation)

    def _update(self, recipe: Recipe) -> tuple[Row, Rows]:
        """Return `trace_of_update`, cached for each optimizer."""
        training = recipe.training
        key = recipe.optimizer.model_dump_json(), training.max_grad_norm, training.accumulates
        if key not in self._updates:
            self._updates[key] = trace_of_update(self.arch.model, recipe)
        return self._updates[key]


def _shapes(batch: Batch) -> Hashable:
    """Return the properties of a batch that decide its trace. Positions follow from the documents."""
    packed = batch.position_ids is not None
    return tuple(batch.input_ids.shape), packed, batch.documents, batch.tokens, batch.supervised


def _trace(
    model: nn.Module, optimizer: Optimizer, batch: Batch, run: Callable[[Batch], object], fake: Fake
) -> tuple[Trace, list[Call]]:
    """Trace `run` on a fake of the batch, without the memory that is live before; return the layers' calls too."""
    known = inventory.inventory(model, optimizer)
    kernels = MetaKernels() if any(map(is_experts, model.modules())) else nullcontext()
    with LiveBytes(known) as live, layers_marked(model, live) as calls, kernels, as_packed(batch):
        run(faked(batch, fake))
    return live.trace().from_first_phase().without(bytes_by_part(known)), calls


def _joined(step: Trace, update: Rows, evaluation: Trace | None) -> Trace:
    """Join the traces of the passes, the update and the evaluation."""
    rows, marks = [step.parts, update], [*step.marks, Mark(len(step.parts), Phase.UPDATE)]
    if evaluation is not None:
        marks.append(Mark(len(step.parts) + len(update), Phase.EVALUATION))
        rows.append(evaluation.parts)
    return Trace(np.concatenate(rows), marks)


def _frozen(model: nn.Module, copies: Sequence[int]) -> Row:
    """Return the bytes [parts] of the frozen model, including the layers that do not run."""
    layers = decoder_layers(model)
    row = bytes_by_part(inventory.of_model(model))
    times = Counter(copies)
    for number in range(len(layers)):
        if times[number] != 1:
            row = row + (times[number] - 1) * bytes_by_part(inventory.of_layer(layers, number))
    return row


def _not_in_tensors(rows: Rows, *, offload: bool) -> Row:
    """Return the GPU bytes [parts] that are not in tensors. With `offload`, saved activations are temporary too."""
    row = np.zeros(len(PARTS), dtype=np.int64)
    permanent, temporary = (
        rows[:, [_COLUMN[part] for part in parts]].sum(axis=1).max()
        for parts in (_PERMANENT, (*_TEMPORARY, "saved_activations") if offload else _TEMPORARY)
    )
    row[_COLUMN["working_set"]] = CUBLAS_WORKSPACE_BYTES
    row[_COLUMN["allocator_slack"]] = int(
        FRAGMENTATION_STATIC * permanent + FRAGMENTATION_TRANSIENT * temporary
    )
    row[_COLUMN["device_context"]] = DEVICE_CONTEXT_BYTES
    return row


def _host_bytes(recipe: Recipe, batch: Batch, arch: Architecture, layers: int) -> int:
    """Return the host bytes of `qlora.model.offload`: the embedding, and the inputs of `layers` layers.

    Each input takes a pinned block, rounded up to a power of two. With micro-batches of many sizes the host can need
    twice as much, because torch keeps blocks of each size.
    """
    embedding = embedding_of(arch.model).weight
    size = embedding.nbytes if recipe.base.embedding == "host" else 0
    if recipe.training.activation_offloading and layers:
        tokens = batch.input_ids.numel() if arch.padded else batch.tokens
        hidden = arch.config.get_text_config().hidden_size
        size += layers * (1 << (tokens * hidden * embedding.itemsize - 1).bit_length())
    return size


def _with_checkpointing(recipe: Recipe, layers: int, mlps: int) -> Recipe:
    setting = Checkpointing(full=layers, mlp=mlps)
    training = recipe.training.model_copy(update={"activation_checkpointing": setting})
    return recipe.model_copy(update={"training": training})
