"""One training step on one batch: token ids in, loss and gradients out.

The only `backward()` of the package. Training and evaluation call it with real tensors; a memory forecast can
run it under FakeTensorMode, so what is forecast is what will happen. It knows models, not files or recipes.

The loss of an optimizer step is the sum of the token losses divided by the supervised tokens of the whole
step, over all its micro-batches: K micro-batches equal one batch, whatever their lengths. (Averaging the
micro-batches' means instead weighs tokens of short answers more: huggingface/transformers#34191.)

The phases forward, loss, backward and evaluation are announced with `record_function`: a profiler shows them,
and the memory room (`qlora.memory.live`) books live bytes by them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora import attention
from qlora.data import Batch
from qlora.device import tokens_together
from qlora.errors import ModelError
from qlora.host import HostEmbedding, Shelf
from qlora.llama import LlamaLayer, Recompute
from qlora.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model: logits = softcap(logit_scale · (hidden Wᵀ + bias))."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None  # [vocabulary]
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, V] in fp32; both on the head's device."""
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            # Tensor cores sum in fp32: take the sums before they are rounded to 16 bits
            logits = torch.mm(hidden, self.weight.to(hidden.dtype).T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits += self.bias
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "Head":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


def head_of(model: nn.Module) -> Head:
    """The model's output head, with the scalings that some architectures apply to their logits.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 and 3 cap with
    `final_logit_softcapping`. `check_head` proves that nothing else is done to them.
    """
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    if embeddings is None or not hasattr(embeddings, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no plain output head: qlora trains causal language models, and their head "
            "cannot be an adapter's target"
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", 0) or 1.0
    )
    return Head(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The decoder's last hidden states [B, T, H], and for each position the token that it predicts [B, T].

    A model that reads documents gets them end to end in one row, B = 1, unless the rows have no padding to lose; on
    some devices filled up to a multiple of tokens, see `tokens_together`.
    To others no attention mask is ever passed: padding stands on the right, where a causal model cannot look, and
    position ids that restart at 0 make transformers keep the documents of a packed row apart.
    """
    device = next(model.parameters()).device
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    more: dict[str, object] = {}
    if model.config._attn_implementation == attention.NAME:  # type: ignore[union-attr]
        multiple = tokens_together(device, embedding.weight.dtype)
        if batch.plain and batch.input_ids.numel() % multiple == 0:
            more = attention.of_whole_rows(batch.input_ids.shape[1], device)
        else:
            batch, lengths = batch.end_to_end(multiple)
            more = attention.arguments(lengths, device)
    elif batch.position_ids is not None:
        more = {"position_ids": batch.position_ids.to(device, non_blocking=True)}
    ids = batch.input_ids.to(embedding.weight.device, non_blocking=True)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **more).last_hidden_state  # type: ignore[operator]
    labels = batch.labels.to(device, non_blocking=True)
    return hidden, F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states [N, H] from which the batch's N supervised tokens are predicted, and those tokens [N]."""
    hidden, targets = (found.flatten(0, 1) for found in hidden_states(model, batch))
    supervised = targets != IGNORE_INDEX
    return hidden[supervised], targets[supervised]


def loss_sum(model: nn.Module, batch: Batch, *, loss_chunk: int | None = None) -> Tensor:
    """The summed cross-entropy (nats, fp32 scalar) of the batch's supervised tokens.

    Hidden states of tokens that nothing is learned from never reach the head; those of the others do so
    `loss_chunk` at a time (None: as many as `tokens_at_once` says).
    """
    hidden, targets = hidden_states(model, batch)
    head = head_of(model)
    with record_function("loss"):
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            targets.flatten(),
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            chunk=loss_chunk,
            supervised=batch.supervised,  # known on the host, so that a GPU is not made to wait
        )


def fold_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that randomness is a function and not a state to save."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    rank: int = 0,
    processes: int = 1,
    loss_chunk: int | None = None,
) -> Tensor:
    """Add the gradients of one optimizer step to the parameters' `.grad`.

    `batches` are all micro-batches of the step; process `rank` of `processes` works on every `processes`-th of
    them, so the sum over the processes is the step. Dropout of a micro-batch depends on (seed, step,
    micro-batch) alone.

    Returns:
        this process's share of the mean loss per supervised token (nats, fp32 scalar, on the device).
    """
    supervised = sum(batch.supervised for batch in batches)
    assert supervised > 0, "a step without a supervised token; the data package must not make one"
    total = torch.zeros((), device=next(model.parameters()).device)
    for index, batch in list(enumerate(batches))[rank::processes]:
        torch.manual_seed(fold_seed(seed, step, index))
        with record_function("forward"):
            loss = loss_sum(model, batch, loss_chunk=loss_chunk) / supervised
        with record_function("backward"):
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rank: int = 0,
    processes: int = 1,
    loss_chunk: int | None = None,
) -> tuple[Tensor, int]:
    """The summed loss (nats, fp32 scalar) over this process's share of `batches`, and the supervised tokens of all.

    Gradients and the training mode are left as they were.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    with evaluation_mode(model), record_function("evaluation"):
        for batch in batches[rank::processes]:
            total += loss_sum(model, batch, loss_chunk=loss_chunk)
    return total, sum(batch.supervised for batch in batches)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while: no dropout, no checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer | LlamaLayer]:
    """The model's layers that can be checkpointed, from the first to the last."""
    kinds = (GradientCheckpointingLayer, LlamaLayer)
    return [module for module in model.modules() if isinstance(module, kinds)]


def checkpoint_layers(
    model: nn.Module, layers: int | None = None, mlps: int = 0, *, offload: bool = False
) -> None:
    """Recompute the activations of the first `layers` decoder layers (None: of all) in the backward pass.

    Of the `mlps` layers after those, the MLP alone is recomputed. Non-reentrant, so frozen embeddings need no
    artificial gradient, and with the random state kept, so dropout draws the same mask twice. `offload`: what these
    layers keep, their inputs, lies in host memory meanwhile.
    """
    found = decoder_layers(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be checkpointed: set training.gradient_checkpointing=false "
            "and leave training.mlp_checkpointing out"
        )
    count = len(found) if layers is None else min(layers, len(found))
    kept_by = Shelf().checkpoint if offload else partial(checkpoint, use_reentrant=False)
    for index, layer in enumerate(found):
        alone = count <= index < count + mlps
        if isinstance(layer, LlamaLayer):
            layer.recompute = (
                Recompute.ALL if index < count else Recompute.MLP if alone else Recompute.NOTHING
            )
            layer.checkpoint = kept_by
            continue
        if alone:
            raise ModelError(
                f"{type(model).__name__} has no layers of ours, whose MLP can be recomputed alone: "
                "set training.mlp_checkpointing=false"
            )
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = kept_by


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on eight tokens that our loss is the loss of the model's own logits.

    Guards against architectures that do something to their logits that `head_of` does not know.
    """
    vocabulary = head_of(model).weight.shape[0]
    ids = torch.arange(8)[None] * 7 % vocabulary  # [1, 8]
    batch = Batch(input_ids=ids, labels=ids.clone(), position_ids=None, tokens=8, supervised=7)
    with evaluation_mode(model):
        try:
            ours = loss_sum(model, batch).item()
        except RuntimeError as error:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
            if not isinstance(embedding, HostEmbedding):
                raise
            raise ModelError(
                f"base.embedding: {type(model).__name__} needs the token ids on the GPU too, so leave the key out "
                f"({str(error).splitlines()[0]})"
            ) from error
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), use_cache=False).logits.float()  # [1, 8, V]
        theirs = F.cross_entropy(logits[0, :-1], ids[0, 1:].to(device), reduction="sum").item()
    if abs(ours - theirs) > 0.02 * abs(theirs) + 0.02:
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way qlora does not know "
            f"(loss {ours:.4f}, by its own forward {theirs:.4f}). Please report the architecture."
        )


def read_documents_if_apart(model: PreTrainedModel) -> None:
    """Give the model attention over documents end to end, if it can take it and is seen to keep them apart."""
    before = model.config._attn_implementation
    attention.read_documents(model)
    try:
        apart = _kept_apart(model)[0]
    except torch.OutOfMemoryError:
        raise
    except (
        ModelError,
        RuntimeError,
    ):  # its attention wants more than ours gives: sinks, or a mask in any case
        apart = False
    if not apart:
        model.set_attn_implementation(before)


def check_packing(model: nn.Module) -> None:
    """Prove that documents which share a row do not see each other.

    Architectures that do not build their attention mask from the position ids would leak in silence.
    """
    passed, together, apart = _kept_apart(model)
    if not passed:
        raise ModelError(
            f"{type(model).__name__} lets documents that are packed into one row see each other "
            f"(loss {together:.4f}, apart {apart:.4f}): set data.packing=false"
        )


@torch.no_grad()
def _kept_apart(model: nn.Module) -> tuple[bool, float, float]:
    """Whether two documents of eight tokens cost in one row what they cost in two, and both losses."""
    vocabulary = head_of(model).weight.shape[0]
    ids = (torch.arange(16) * 11 + 3) % vocabulary
    labels = ids.clone()
    labels[[0, 8]] = IGNORE_INDEX
    positions = torch.arange(8).repeat(2)[None]  # [1, 16]
    packed = Batch(ids[None], labels[None], positions, tokens=16, supervised=14, documents=((8, 8),))
    alone = Batch(ids.view(2, 8), labels.view(2, 8), None, tokens=16, supervised=14)
    with evaluation_mode(model):
        together, apart = loss_sum(model, packed).item(), loss_sum(model, alone).item()
    return abs(together - apart) <= 0.005 * abs(apart) + 0.01, together, apart
