"""What memory a run will take, part by part, from its recipe and its model's config.json alone.

The very step of training (`objective.step`) is run under FakeTensorMode: no storage, no weights, no GPU.
What it would allocate is counted as in a measurement (`live.py`). Of alike layers only a few are run, and the
trace is stretched (`repeat.py`). What no tensor shows, a GPU's context and the allocator's slack, is added as
constants.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.data import Batch
from qlora.memory import inventory
from qlora.memory.architecture import Architecture, dtype_on, shortened
from qlora.memory.fake_tensors import MetaKernels, as_packed, faked, keep_all_layers
from qlora.memory.live import ROUNDING, LiveBytes, Mark, Trace
from qlora.memory.parts import PARTS
from qlora.memory.repeat import repeat_all
from qlora.memory.workload import Workload
from qlora.model.checkpointing import decoder_layers
from qlora.model.prepare import apply_checkpointing, build, build_optimizer, checkpointed
from qlora.model.varlen_attention import read_documents
from qlora.objective import objective_of
from qlora.objective.step import accumulate, evaluate
from qlora.optim import Optimizer
from qlora.optim.flat import BLOCK_SIZE, CHUNK_SIZE
from qlora.recipe import Checkpointing, Recipe
from qlora.runtime.fake import FakeTensors
from qlora.runtime.phases import Phase, announce

KEPT_LAYERS = 3
"""of a run of alike layers: the first and the last have neighbours of another kind, the middle one is the rule"""

KEPT_OFFLOADED = 5
"""the same where their inputs go to the host, each as the next layer begins: the first's, the embeddings, stays too"""

FEW_CHUNKS = 3

CUBLAS_WORKSPACE_BYTES = 2 * 32 * 2**20
"""torch gives cuBLAS 32 MiB on Hopper (8 MiB before it), once for each thread that multiplies: forward, backward"""

DEVICE_CONTEXT_BYTES = 550 * 10**6
"""CUDA context with torch's and bitsandbytes' kernels; assumed, not measured yet"""

FRAGMENTATION_STATIC, FRAGMENTATION_TRANSIENT = 0.006, 0.09
"""what torch's allocator reserves beyond what lives: gaps that the making of the model left, as a share of it, and
those between the tensors of a layer in flight, as a share of these (`benchmarks/null_gpu`). What is saved for the
backward lies close together"""

_STANDING = (
    "base_nf4",
    "quantization_statistics",
    "base_unquantized",
    "adapters",
    "gradients",
    "optimizer_state",
)
_PASSING = ("working_set", "logits_and_loss", "dequantization")

Fake = Callable[[Tensor], Tensor]
"""a real tensor -> a fake one"""

Row = NDArray[np.int64]
"""[parts]"""
Rows = NDArray[np.int64]
"""[events, parts]"""

_COLUMN = {part: index for index, part in enumerate(PARTS)}


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    trace: Trace
    batch: Batch
    """the micro-batch that takes the most"""
    layers: int
    checkpointed_layers: int
    checkpointed_mlps: int
    """layers beside those of which the MLP alone is recomputed"""
    loss_chunk: int
    host_bytes: int
    """of host memory, for what a GPU is spared; paged optimizer state, which may come, is not counted"""
    parameters: int
    """of the whole model, adapters not counted"""
    trained_parameters: int

    @property
    def total_bytes(self) -> int:
        """At the peak."""
        return int(self.trace.totals.max())


def forecast(recipe: Recipe, workload: Workload, arch: Architecture, *, cuda: bool) -> Forecast:
    """Live bytes of an optimizer step and an evaluation on the largest batches of a run.

    Args:
        recipe: what is run.
        workload: its largest batches; their tensors are read for their shapes only.
        arch: of the recipe's base.
        cuda: on a GPU, else on this machine's CPU.

    >>> forecast(recipe, assumed(recipe), architecture(recipe, cuda=True), cuda=True).total_bytes
    """
    return Forecaster(arch, cuda=cuda).forecast(recipe, workload)


class Forecaster:
    """Makes forecasts with one architecture, and keeps the models and traces that several of them share.

    Two plans that differ in how many layers are recomputed, not in whether any are, share their traces: a search
    through all of them traces a few.

    >>> forecaster = Forecaster(architecture(recipe, cuda=True), cuda=True)
    >>> [forecaster.forecast(recipe, resized(workload, rows=rows)).total_bytes for rows in (1, 2, 4)]
    """

    def __init__(self, arch: Architecture, *, cuda: bool) -> None:
        self.arch, self.cuda = arch, cuda
        self._fakes = FakeTensors(cuda=cuda)
        self._models: dict[Hashable, tuple[nn.Module, Optimizer]] = {}
        self._traces: dict[Hashable, Trace] = {}
        self._updates: dict[Hashable, tuple[Row, Rows]] = {}

    def forecast(self, recipe: Recipe, workload: Workload) -> Forecast:
        """As the function `forecast`; `recipe` is one whose base and adapter make this architecture."""
        arch, cuda = self.arch, self.cuda
        whole, mlps = checkpointed(recipe, arch.layers)
        few = KEPT_OFFLOADED if cuda and recipe.training.activation_offloading else KEPT_LAYERS
        kept, copies = _kept(arch, (whole, mlps, arch.layers - whole - mlps), few)
        small = _with_checkpointing(recipe, *kept[:2])
        with self._fakes.made() as fake, torch.random.fork_rng([]):
            model, optimizer = self._few_layers(small, sum(kept))
            batch, step, evaluation = self._passes(model, optimizer, workload, fake, small, copies)
            standing = _standing(model, copies)
            optimizer_state, update = self._update(recipe)
        trace = _joined(step, update, evaluation)
        rows = trace.parts + standing + optimizer_state
        if cuda:
            rows = rows + _beside_the_tensors(rows, offload=recipe.training.activation_offloading)
        trained = sum(parameter.numel() for parameter in trainable_parameters(arch.model).values())
        total = sum(parameter.numel() for parameter in arch.model.parameters())
        return Forecast(
            Trace(rows, trace.marks),
            batch=batch,
            layers=arch.layers,
            checkpointed_layers=whole,
            checkpointed_mlps=mlps,
            loss_chunk=arch.loss_chunk(recipe),
            host_bytes=_host_bytes(recipe, workload.train, arch, whole) if cuda else 0,
            parameters=total - trained if recipe.adapter.facts.frozen_base else total,
            trained_parameters=trained,
        )

    def _few_layers(self, recipe: Recipe, layers: int) -> tuple[nn.Module, Optimizer]:
        """A model of so many layers that recomputes what the recipe says, and its optimizer."""
        key = layers, *(part.model_dump_json() for part in (recipe.base, recipe.adapter, recipe.optimizer))
        if key not in self._models:
            dtype = str(dtype_on(recipe, self.cuda)).removeprefix("torch.")
            base = recipe.base.model_copy(update={"init": "synthetic", "compute_dtype": dtype})
            synthetic = recipe.model_copy(update={"base": base})
            self._models[key] = build(synthetic, "cpu", config=shortened(self.arch.config, layers))
            if not self.arch.padded:
                read_documents(self._models[key][0])
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
        copies: list[tuple[int, int]],
    ) -> tuple[Batch, Trace, Trace | None]:
        """The micro-batch that takes the most, its passes, and an evaluation.

        Passes are those of the whole model, see `repeat_all` about the `copies` of its layers; what stands in memory
        all through the run is left out.
        """
        objective = objective_of(recipe)
        layers = len(decoder_layers(model))

        def step(batch: Batch) -> None:
            optimizer.zero_grad()
            accumulate(model, [batch], objective, seed=0, step=0)

        def to_loss(batch: Batch) -> None:
            with announce(Phase.FORWARD):
                objective.loss(model, batch)

        def evaluation(batch: Batch) -> None:
            evaluate(model, [batch], objective)

        def trace(batch: Batch, run: Callable[[Batch], object]) -> Trace:
            key = recipe.model_dump_json(), layers, _shapes(batch), run.__name__
            if key not in self._traces:
                self._traces[key] = _trace(model, optimizer, batch, run, fake)
            return self._traces[key]

        def whole(trace: Trace) -> Trace:
            return repeat_all(trace, copies)

        batch, most = workload.train, whole(trace(workload.train, step))
        # With fewer tokens than the largest, the densest can only take more in the loss: half a step tells
        dense = workload.densest
        if dense is not None and whole(trace(dense, to_loss)).totals.max() > most.totals.max():
            batch, most = dense, whole(trace(dense, step))
        evaluated = workload.evaluation
        return batch, most, None if evaluated is None else trace(evaluated, evaluation)

    def _update(self, recipe: Recipe) -> tuple[Row, Rows]:
        """`_trace_of_update`, made once for each optimizer."""
        key = recipe.optimizer.model_dump_json(), recipe.training.max_grad_norm
        if key not in self._updates:
            self._updates[key] = _trace_of_update(self.arch, recipe)
        return self._updates[key]


def _shapes(batch: Batch) -> Hashable:
    """All that a trace reads of a batch; its positions follow from its documents."""
    packed = batch.position_ids is not None
    return tuple(batch.input_ids.shape), packed, batch.documents, batch.tokens, batch.supervised


def _trace(
    model: nn.Module, optimizer: Optimizer, batch: Batch, run: Callable[[Batch], object], fake: Fake
) -> Trace:
    """What comes and goes while `run` works on a fake of the batch, less what stands in memory before."""
    known = inventory.inventory(model, optimizer)
    experts = any("experts" in name for name, _ in model.named_modules())
    kernels = MetaKernels() if experts else nullcontext()
    with LiveBytes(known) as live, _layers_marked(model, live), kernels, as_packed(batch):
        run(faked(batch, fake))
    return live.trace().announced().without(_row(known))


def _joined(step: Trace, update: Rows, evaluation: Trace | None) -> Trace:
    """The passes, the update after them, then the evaluation."""
    rows, marks = [step.parts, update], [*step.marks, Mark(len(step.parts), Phase.UPDATE)]
    if evaluation is not None:
        marks.append(Mark(len(step.parts) + len(update), Phase.EVALUATION))
        rows.append(evaluation.parts)
    return Trace(np.concatenate(rows), marks)


def _trace_of_update(arch: Architecture, recipe: Recipe) -> tuple[Row, Rows]:
    """What the optimizer over all that is trained holds, and the rows of an update.

    One parameter stands for all of a kind: the optimizer lays them end to end in any case, and updates them
    chunk by chunk, of which a few show what all do.
    """
    sizes: dict[tuple[torch.dtype, bool], int] = {}
    for parameter in trainable_parameters(arch.model).values():
        kind = parameter.dtype, parameter.ndim >= 2  # weight decay is for matrices
        sizes[kind] = sizes.get(kind, 0) - (-parameter.numel() // BLOCK_SIZE)
    standing = _row(inventory.of_optimizer(_optimizer_over(sizes, recipe)))
    few = {kind: min(blocks, FEW_CHUNKS * CHUNK_SIZE // BLOCK_SIZE) for kind, blocks in sizes.items()}
    optimizer = _optimizer_over(few, recipe)
    known = list(inventory.of_optimizer(optimizer))
    with LiveBytes(known) as live:
        optimizer.clip(recipe.training.max_grad_norm)
        optimizer.step(recipe.optimizer.lr)
    return standing, live.trace().parts - _row(known)


def _optimizer_over(sizes: Mapping[tuple[torch.dtype, bool], int], recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over so many blocks of each (dtype, is a matrix)."""
    whole = nn.Module()
    for number, ((dtype, is_matrix), blocks) in enumerate(sizes.items()):
        shape = (blocks, BLOCK_SIZE) if is_matrix else (blocks * BLOCK_SIZE,)
        whole.register_parameter(str(number), nn.Parameter(torch.empty(shape, dtype=dtype)))
    return build_optimizer(whole, recipe)


def _standing(model: nn.Module, copies: list[tuple[int, int]]) -> Row:
    """[parts]: the frozen model, with the layers that were left out."""
    layers = decoder_layers(model)
    row = _row(inventory.of_model(model))
    for layer, count in copies:
        row = row + count * _row(inventory.of_model(layers[layer]))
    return row


def _row(tensors: Iterable[tuple[Tensor, str]]) -> Row:
    """[parts]: bytes of the tensors' storages, each counted once."""
    row = np.zeros(len(PARTS), dtype=np.int64)
    seen = set()
    for tensor, part in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            row[_COLUMN[part]] += -(-storage.nbytes() // ROUNDING) * ROUNDING
    return row


def _beside_the_tensors(rows: Rows, *, offload: bool) -> Row:
    """[parts]: what a process takes of a GPU beside its tensors. `offload`: what is saved comes and goes as well."""
    row = np.zeros(len(PARTS), dtype=np.int64)
    standing, passing = (
        rows[:, [_COLUMN[part] for part in parts]].sum(axis=1).max()
        for parts in (_STANDING, (*_PASSING, "saved_activations") if offload else _PASSING)
    )
    row[_COLUMN["working_set"]] = CUBLAS_WORKSPACE_BYTES
    row[_COLUMN["allocator_slack"]] = int(FRAGMENTATION_STATIC * standing + FRAGMENTATION_TRANSIENT * passing)
    row[_COLUMN["device_context"]] = DEVICE_CONTEXT_BYTES
    return row


def _host_bytes(recipe: Recipe, batch: Batch, arch: Architecture, layers: int) -> int:
    """What `qlora.model.offload` takes: the embedding, and inputs of so many layers, each in a block of a power of two.

    Up to twice as much where micro-batches are of many sizes: torch keeps pinned blocks of each.
    """
    embedding = arch.model.get_input_embeddings().weight
    found = embedding.nbytes if recipe.base.embedding == "host" else 0
    if recipe.training.activation_offloading and layers:
        tokens = batch.input_ids.numel() if arch.padded else batch.tokens
        hidden = arch.config.get_text_config().hidden_size
        found += layers * (1 << (tokens * hidden * embedding.itemsize - 1).bit_length())
    return found


def _kept(arch: Architecture, counts: Sequence[int], few: int) -> tuple[list[int], list[tuple[int, int]]]:
    """How many layers are run of each kind, of which there are `counts`, and which stand for how many more."""
    if not arch.alike:
        return list(counts), []
    kept = [min(count, few) for count in counts]
    firsts = [0, *itertools.accumulate(kept)]
    copies = [
        (first + few // 2, count - run) for first, count, run in zip(firsts, counts, kept, strict=False)
    ]
    return kept, [(layer, missing) for layer, missing in copies if missing > 0]


def _with_checkpointing(recipe: Recipe, layers: int, mlps: int) -> Recipe:
    setting = Checkpointing(full=layers, mlp=mlps)
    training = recipe.training.model_copy(update={"activation_checkpointing": setting})
    return recipe.model_copy(update={"training": training})


@contextmanager
def _layers_marked(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Note in the trace when the passes enter and leave each decoder layer."""

    def enter(number: int, module: nn.Module, args: Any) -> None:
        if live.clock.phase != Phase.BACKWARD:  # there, a checkpointed layer runs forward again
            live.clock.mark(number)

    def leave(number: int, module: nn.Module, args: Any, output: Any) -> None:
        if live.clock.phase == Phase.BACKWARD:
            return
        if (
            number == last
        ):  # else what the layer's frame holds is let go only after this, before the next enters
            live.clock.mark()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.clock.mark(number))

    handles = []
    layers = decoder_layers(model)
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(partial(enter, number)))
        handles.append(layer.register_forward_hook(partial(leave, number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
