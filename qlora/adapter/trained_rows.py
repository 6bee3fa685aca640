"""Embeddings and output heads of which chosen rows are trained, beside any adapter method; PEFT's trainable tokens.

A new token needs a row that means something, in the input embedding and in the output head. Only these rows are
trained; all others stay frozen. Tied weights share one set of rows, as in PEFT. The rows have the dtype of the frozen
weight, so a token that the base knows starts as its row there, bit for bit.

A token that the base does not know starts as the mean of the rows of the pieces that spelled it before: the closest to
how the base has read it so far. Unlike with the mean of all rows, tokens with different spellings start at different
rows. The first logit of a token is at most the largest of its pieces'.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.targets import is_conv1d, is_linear
from qlora.adapter.wrap import replace_modules
from qlora.errors import ModelError, UsageError, listed
from qlora.ops.trained_rows import Rows, replace_columns, replace_rows
from qlora.quantization.nf4 import is_nf4


class TrainedRows(nn.Module):
    """A frozen embedding or output head with trained rows. Rows behind its last extend its vocabulary.

    The class has no `weight` on purpose: code that reads the weight directly would silently skip the trained rows.

    Args:
        base: the embedding or output head, with a weight [V, H]; it is frozen in place.
        ids: token ids of the rows.
        values: [n, H]; several modules can share it.
    """

    base: Any
    index: Tensor
    """[n] int64, the ids on the device of the values"""

    def __init__(self, base: nn.Module, ids: Sequence[int], values: nn.Parameter) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.ids = tuple(ids)
        self.values = values
        rows = len(self.base.weight)
        self.size = max(rows, *(number + 1 for number in self.ids))
        """rows of the embedding or head, with those that extend it"""
        self.register_buffer("index", torch.tensor(self.ids, device=values.device), persistent=False)

    @property
    def rows(self) -> Rows:
        """The trained rows."""
        return Rows(self.index, self.values, self.size)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the frozen weight [V, H] with the trained rows in it [size, H], in fp32."""
        widened = F.pad(weight.float(), (0, 0, 0, self.size - len(weight)))
        index = self.index.to(weight.device)
        return widened.index_copy(0, index, self.values.detach().to(weight.device, torch.float32))

    def __getattr__(self, name: str) -> Any:
        """Look up parameters and modules; for `weight`, raise an error that explains its absence."""
        if name == "weight":
            raise AttributeError(
                "the model reads `weight` instead of calling a layer with trained rows: this architecture does not "
                "support adapter.train_tokens"
            )
        return super().__getattr__(name)

    @classmethod
    def of(cls, model: nn.Module) -> dict[str, Self]:
        """Return the modules of this class in `model` by name, in the order of the model."""
        return {name: module for name, module in model.named_modules() if isinstance(module, cls)}


class EmbeddingRows(TrainedRows):
    """An input embedding with trained rows; maps token ids [...] to [..., H]."""

    positions: Tensor
    """[size] int64: number of each token's trained row; n for a token without one"""

    def __init__(self, base: nn.Module, ids: Sequence[int], values: nn.Parameter) -> None:
        super().__init__(base, ids, values)
        device = self.base.weight.device
        positions = torch.full((self.size,), len(self.ids), device=device)
        positions[self.index.to(device)] = torch.arange(len(self.ids), device=device)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., H] of ids [...]."""
        positions = self.positions[ids.to(self.positions.device)]
        frozen = self.base(ids.masked_fill((positions < len(self.ids)).to(ids.device), 0))
        scale = getattr(self.base, "embed_scale", None)  # Gemma 3
        values = self.values if scale is None else self.values * torch.as_tensor(scale).to(self.values)
        return replace_rows(frozen, values, positions.to(frozen.device))


class HeadRows(TrainedRows):
    """An output head with trained rows; maps hidden states [..., H] to logits [..., size]."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., size] of hidden [..., H]. A row that extends the head has no bias."""
        return replace_columns(self.base(hidden), hidden, self.rows, self.base.bias)


def plain(module: Any) -> Any:
    """Return the frozen embedding or head under trained rows, or else the module itself."""
    return module.base if isinstance(module, TrainedRows) else module


def embedding_and_head(model: nn.Module) -> tuple[str, str | None]:
    """Return the names of the input embedding and of the output head, None for a model without a head.

    Raises:
        UsageError: the model has no input embedding.
    """
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if get else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    if embedding not in names:
        raise UsageError(f"adapter.train_tokens: {type(model).__name__} has no input embedding")
    return names[embedding], names.get(head)


def train_rows(
    model: nn.Module, ids: Sequence[int], spelled: Mapping[int, Sequence[int]] | None = None
) -> nn.Module:
    """Train the rows of these tokens in the input embedding and in the output head of `model`, in place.

    Args:
        model: a model of transformers, with an adapter or without one.
        ids: token ids; those from the embedding's number of rows on extend it, without a gap.
        spelled: ids of the pieces that spelled a token before; the token starts as the mean of their rows.

    Returns:
        The same model.

    Raises:
        ModelError: the embedding or head is quantized, a target of the adapter, or more than a lookup or a product.
        UsageError: the model has no input embedding, or ids leave a gap behind its last row.
    """
    modules = [name for name in embedding_and_head(model) if name is not None]
    values: dict[nn.Module, nn.Parameter] = {}
    for name in modules:
        check_rows(model, name, ids)
        module = plain(model.get_submodule(name))
        shared = next((other for other in values if other.weight is module.weight), None)
        values[module] = values[shared] if shared else nn.Parameter(_initial(module, ids, spelled or {}))
    place_rows(model, {name: (ids, values[plain(model.get_submodule(name))]) for name in modules})
    return model


def place_rows(model: nn.Module, rows: Mapping[str, tuple[Sequence[int], nn.Parameter]]) -> None:
    """Put trained rows around the modules of these names, in place of earlier ones.

    Raises:
        ModelError: as `train_rows`; the model is unchanged.
        UsageError: as `train_rows`; the model is unchanged.
    """
    replacements = {}
    for name, (ids, values) in rows.items():
        module = model.get_submodule(name)
        replacements[module] = check_rows(model, name, ids)(plain(module), ids, values)
    replace_modules(model, replacements)


def merge_rows(model: nn.Module) -> None:
    """Put the trained rows into the weights of `model`, in place, so that its embedding and head are plain again."""
    weights: dict[tuple[Tensor, Tensor], nn.Parameter] = {}  # tied weights stay tied
    replacements: dict[nn.Module, nn.Module] = {}
    for module in TrainedRows.of(model).values():
        base, key = module.base, (module.base.weight, module.values)
        if key not in weights:
            merged = module.merged_weight(base.weight.detach()).to(base.weight.dtype)
            weights[key] = nn.Parameter(merged, requires_grad=False)
        merged_module = copy.copy(base)
        if "weight" in base._parameters:
            merged_module._parameters = {**base._parameters, "weight": weights[key]}
        else:  # in host memory
            object.__setattr__(merged_module, "weight", weights[key].detach())
        if base._parameters.get("bias") is not None:
            widened = F.pad(base.bias.detach(), (0, module.size - len(base.bias)))
            merged_module._parameters["bias"] = nn.Parameter(widened, requires_grad=False)
        for size in ("num_embeddings", "out_features"):
            if hasattr(base, size):
                setattr(merged_module, size, module.size)
        replacements[module] = merged_module
        if hasattr(model, "config"):
            model.config.get_text_config().vocab_size = module.size  # type: ignore[union-attr, operator]
    replace_modules(model, replacements)


def check_rows(model: nn.Module, name: str, ids: Sequence[int]) -> type[TrainedRows]:
    """Return the class that trains these rows of the module `name`.

    Raises:
        ModelError: as `train_rows`.
        UsageError: as `train_rows`.
    """
    module = plain(model.get_submodule(name))
    kind = _kind(name, module)
    _check_ids(name, module, ids)
    if max(ids) >= len(module.weight) and (others := _further_tables(model)):
        raise ModelError(
            f"adapter.train_tokens: {type(model).__name__} looks tokens up in {listed(others)} too, which has no row "
            f"for a new token. Name only tokens that the base's tokenizer has (ids below {len(module.weight):,})"
        )
    return kind


def _further_tables(model: nn.Module) -> list[str]:
    """Return the names of the embeddings of tokens beside the input embedding, such as those for layers in Gemma 3n."""
    rows = len(plain(model.get_submodule(embedding_and_head(model)[0])).weight)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    sizes = {rows, getattr(text, "vocab_size_per_layer_input", None)}
    known = {plain(model.get_submodule(name)) for name in embedding_and_head(model) if name is not None}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module not in known
        and len(module.weight) in sizes
        and "position" not in name
    ]


def _kind(name: str, module: nn.Module) -> type[TrainedRows]:
    """Return the class for an embedding or an output head. Raises ModelError for another module."""
    if isinstance(module, AdaptedLayer):
        raise ModelError(
            f"adapter.train_tokens: {name} is a target of the adapter too. Leave it out of adapter.targets"
        )
    if is_nf4(module):
        raise ModelError(
            f"adapter.train_tokens: {name} is in NF4, and rows of a quantized weight cannot be replaced. Use a base "
            "whose output head is not quantized"
        )
    if is_linear(module) and not is_conv1d(module):
        return HeadRows
    looked_up = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    if looked_up or hasattr(module, "embed_scale") or getattr(module, "looks_up_rows", False):
        return EmbeddingRows
    raise ModelError(
        f"adapter.train_tokens: {name} is a {type(module).__name__}, which does more than look up rows. Leave this key "
        "out"
    )


def _check_ids(name: str, module: Any, ids: Sequence[int]) -> None:
    rows = len(module.weight)
    if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
        raise UsageError(f"{name}: token ids must be distinct and at least 0, not {list(ids)}")
    new = {number for number in ids if number >= rows}
    if missing := sorted(set(range(rows, max(ids) + 1)) - new):
        raise UsageError(
            f"{name} has {rows:,} rows, and the tokens {listed(list(map(str, missing)))} behind them are not trained. "
            "Train them too: name them in adapter.train_tokens, or set it to new"
        )


def _initial(module: Any, ids: Sequence[int], spelled: Mapping[int, Sequence[int]]) -> Tensor:
    """Return the first values of the rows [n, H], in the dtype of the frozen weight."""
    weight: Tensor = module.weight
    device = getattr(module, "device", weight.device)
    rows = []
    for number in ids:
        pieces = [piece for piece in spelled.get(number, ()) if piece < len(weight)]
        known = number < len(weight) and number not in spelled
        chosen = weight[[number]] if known else weight[pieces] if pieces else weight
        rows.append(chosen.detach()[0] if known else chosen.detach().float().mean(0).to(weight.dtype))
    return torch.stack(rows).to(device)
