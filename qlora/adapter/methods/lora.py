"""LoRA (Hu et al. 2021): h = W x + scaling * B A x, W frozen, A [rank, in] random, B [out, rank] zero.

`LoRALinear` wraps an `nn.Linear`, a 4-bit linear or GPT-2's `Conv1D` and leaves it as it is; `adapt` puts one
around every target of any model. A and B are bf16; the optimizer keeps what bf16 would round away.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qlora.adapter.targets import features, is_conv1d, is_linear, select
from qlora.errors import ModelError, UsageError
from qlora.ops.lora_linear import lora_linear
from qlora.quantization.nf4 import protect, quant_state

Value = TypeVar("Value")

SCALINGS = {
    "alpha/rank": lambda alpha, rank: alpha / rank,  # LoRA, section 4.1
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / math.sqrt(rank),  # rsLoRA, Kalajdzievski 2023
}


class LoRALinear(nn.Module):
    """A frozen linear with a trainable low-rank update; x [..., in] -> [..., out] in x.dtype.

        >>> layer = LoRALinear(nn.Linear(input_dim, output_dim), rank=4, alpha=8)

    base: an `nn.Linear`, 4-bit linear or `Conv1D`, kept as it is and frozen; its bias stays in use.
    rank: of the update. alpha: the update is scaled by alpha/rank (None: alpha = rank, so by 1).
    dropout: on the input of A, in training. scaling: "alpha/rank" or "alpha/sqrt(rank)".
    init: of A, "kaiming" (uniform, a = sqrt(5): the bound is 1/sqrt(in)), "gaussian" (standard deviation
        1/rank) or "zero" (to read an adapter into); B is zero, so training starts at the base.
    generator: a CPU generator for A; None: torch's.

    There is no `weight` on purpose: code that reads it would pass the update by, and nobody would notice.
    Raises ModelError for a module that is no linear layer, UsageError for numbers out of range.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "alpha/rank",
        init: str = "kaiming",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if not is_linear(base):
            raise ModelError(f"LoRALinear wraps nn.Linear, Linear4bit and Conv1D, not {type(base).__name__}")
        alpha = rank if alpha is None else alpha
        _check(rank, alpha, dropout, scaling, init)
        self.base: nn.Linear = base.requires_grad_(False)
        self.fan_in_fan_out = is_conv1d(base)
        """the base's weight is stored as [in, out]; PEFT's name for it"""
        self.in_features, self.out_features = features(base)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = float(SCALINGS[scaling](alpha, rank))
        device = base.weight.device
        a = _initial(init, (rank, self.in_features), device, generator)
        self.lora_a = nn.Parameter(a.to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        base, a, b, scaling = self.base, self.lora_a, self.lora_b, self.scaling
        weight = base.weight.T if self.fan_in_fan_out else base.weight
        state = quant_state(base)
        return lora_linear(x, weight, state, base.bias, a, b, scaling, self.dropout, self.training)

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules, as in every module; says why there is no weight."""
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the model reads `{name}` past the adapted layer: leave it out of the targets"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def adapt(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    scaling: str = "alpha/rank",
    init: str = "kaiming",
    targets: str | Sequence[str] = "attention",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Freeze `model` and wrap its `targets` (see `select`) in LoRALinears, in place; returns the model.

        >>> model = adapt(model, rank=16, targets="all-linear")

    Works for any `nn.Module` with linear layers, on the meta device too. Arguments are those of `LoRALinear`.
    `rank_pattern` and `alpha_pattern` override rank and alpha where a key, a regular expression, matches a
    layer's name or its last parts; the first match counts. Each A depends on (seed, name of the layer) alone,
    whatever the device and the other targets.

    Raises ModelError if the model is adapted already, UsageError if an argument is wrong or matches no layer.
    """
    if lora_layers(model):
        raise ModelError("the model has LoRA layers already: adapt a base, or load an adapter into this one")
    names = select(model, targets)
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    for key in [*ranks, *alphas]:
        if not any(_fits(key, name) for name in names):
            raise UsageError(f'rank_pattern or alpha_pattern: "{key}" matches no targeted layer')
    protect(model.requires_grad_(False))
    layers = {
        name: LoRALinear(
            model.get_submodule(name),
            rank=pattern_value(ranks, name, rank),
            alpha=pattern_value(alphas, name, rank if alpha is None else alpha),
            dropout=dropout,
            scaling=scaling,
            init=init,
            generator=layer_generator(seed, name),
            dtype=dtype,
        )
        for name in names
    }
    return wrap(model, layers)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of `model` by name, in its order.

    >>> sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in lora_layers(model).values())
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name.

    >>> optimizer = torch.optim.AdamW(trainable_parameters(adapt(model)).values(), lr=2e-4)
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Trainable parameters of one adapted layer: A and B have rank * (in + out)."""
    return rank * (in_features + out_features)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _initial(
    init: str, shape: tuple[int, int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """The first A [rank, in], fp32, drawn on the CPU so that every device starts from the same numbers."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if init == "zero":
        return torch.zeros(shape)
    a = torch.empty(shape)
    if init == "gaussian":
        return a.normal_(0.0, 1 / shape[0], generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return a.uniform_(-bound, bound, generator=generator)


def _fits(key: str, name: str) -> bool:
    """Whether `key` matches a name or its last parts, as PEFT's rank_pattern does."""
    return _expression(key).match(name) is not None


@lru_cache(maxsize=4096)  # a key for each layer of a large model: re's own cache is too small
def _expression(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise UsageError(
            f'rank_pattern or alpha_pattern: "{key}" is no regular expression ({error})'
        ) from error


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that matches `name`, else `default`."""
    return next((value for key, value in patterns.items() if _fits(key, name)), default)


def wrap(model: nn.Module, layers: Mapping[str, LoRALinear]) -> nn.Module:
    """Put each LoRALinear in the place of its base, whose name in `model` is its key; returns the model."""
    _replace(model, {layer.base: layer for layer in layers.values()})
    _forbid_fused_inference(model)
    return model


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value where its key stands, everywhere: a module may be shared under several names."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, attribute, replacements[child])


def _forbid_fused_inference(model: nn.Module) -> None:
    """In eval mode torch's encoder computes from the weights of its layers and never calls them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "no activation that the fused path knows"
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _check(rank: int, alpha: float, dropout: float, scaling: str, init: str) -> None:
    if rank < 1:
        raise UsageError(f"rank must be at least 1, not {rank}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"alpha must be above 0, not {alpha}")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}")
    if scaling not in SCALINGS:
        raise UsageError(f"scaling must be {' or '.join(SCALINGS)}, not {scaling!r}")
    if init not in ("kaiming", "gaussian", "zero"):
        raise UsageError(f"init must be kaiming, gaussian or zero, not {init!r}")
