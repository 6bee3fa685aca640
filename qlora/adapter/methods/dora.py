"""DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): h = m (W + scaling * B A) / ||W + scaling * B A|| x + bias.

Each row of the weight is split into its norm m, which is trained, and its direction, which LoRA trains. W is frozen, m
[out] starts at the norms of W's rows and B at zero, so the model starts as the base. ||.|| are the norms of the rows,
over the inputs; the gradient treats them as constants (section 4.3).

m is fp32, because it must start at the norms exactly for the layer to equal the base, and bf16 would round them by up
to 0.4%. It takes 4 bytes for each output, a small part of B.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qlora.adapter.config import check_config, config_of
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import Lora, LoRALinear, adapt, spec_of
from qlora.adapter.methods.method import AdapterMethod
from qlora.adapter.peft_parameters import taken_for_experts
from qlora.adapter.targets import features
from qlora.errors import listed
from qlora.ops.dora_linear import dora_linear, row_norms, row_squares
from qlora.ops.products import Linear, Update
from qlora.quantization.nf4 import dense
from qlora.recipe import Adapter

SUFFIX_MAGNITUDE = ".lora_magnitude_vector"


class DoraLinear(LoRALinear):
    """A frozen linear with a low-rank update and a trained norm of each row (DoRA).

    The layer maps x [..., in] to m (W + scaling * B A) / ||W + scaling * B A|| x + bias, [..., out] in x.dtype. In
    training with dropout, the whole change of the layer sees the dropped input, as in PEFT.

    The arguments and errors are those of `LoRALinear`.
    """

    SAVED: ClassVar = {**LoRALinear.SAVED, SUFFIX_MAGNITUDE: "magnitude"}

    squares: Tensor
    """squared norms [out] of the rows of W, in fp32 (fp64 if W is fp64); computed once, because W is frozen"""

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec, generator)
        weight, state = self.frozen
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if weight.is_meta:
            squares = torch.empty(self.out_features, dtype=wide, device=weight.device)
        else:
            squares = row_squares(dense(weight, state, wide))
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt())
        self._kept: tuple[Any, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer, as every module; a cast to 16 bits leaves m and the squared norms in fp32."""

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_rounded = tensor.ndim == 1 and result.element_size() < 4
            return tensor.to(result.device, torch.float32) if is_rounded else result

        self._kept = None
        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(apply, recurse=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        linear, update = self.product()
        return dora_linear(
            x, linear, update, self.magnitude, self.squares, self._known_norms(x, linear, update)
        )

    def _known_norms(self, x: Tensor, linear: Linear, update: Update) -> Tensor | None:
        """Return the norms of the rows for the few tokens of a generation step, where they cost as much as the output.

        They are kept until A or B can have changed: a training step begins with a forward pass that records gradients,
        and any other change in place raises a tensor's version.
        """
        few = x.numel() <= self.spec.rank * self.in_features
        if self.training or torch.is_grad_enabled() or not few:
            self._kept = None
            return None
        a, b = self.lora_a, self.lora_b
        key = id(a), a._version, id(b), b._version, a.device
        if self._kept is None or self._kept[0] != key:
            weight = dense(linear.weight, linear.state, x.dtype)
            self._kept = key, row_norms(weight, self.squares, update, linear.scaling)
        return self._kept[1]

    @classmethod
    def shapes(cls, linear: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [rank, in], B [out, rank] and m [out]."""
        return {**super().shapes(linear, spec), SUFFIX_MAGNITUDE: (features(linear)[1],)}

    def numbers(self, weight: Tensor) -> dict[str, float]:
        """Return the rank, and the mean relative change of the norms of the rows of `weight` but rows of zeros."""
        norms = torch.linalg.vector_norm(weight, dim=1)
        rows = norms > 0
        moved = (self.magnitude.detach()[rows] / norms[rows] - 1).abs()
        return {"rank": self.rank, "row norms moved": moved.sum().item() / max(1, len(moved))}

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return the dense weight m (W + scaling * B A) / ||W + scaling * B A|| [out, in] in fp32 or fp64.

        Args:
            weight: dense W [out, in]; None means the layer's own frozen weight, dequantized if it is 4-bit. The norms
                are those of this weight with the update.
        """
        merged = super().merged_weight(weight)
        norms = torch.linalg.vector_norm(merged, dim=1).clamp_(min=torch.finfo(merged.dtype).tiny)
        return merged.mul_((self.magnitude.detach().to(merged) / norms)[:, None])


class Dora(Lora):
    """DoRA: trains A, B and the norms of the rows of every target."""

    name = "dora"
    layers = (DoraLinear,)
    why_no_sum = (
        "the trained norms rescale the weight of the base, so a sum of updates is not the update of a sum"
    )

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return True if `config` is one of LoRA with use_dora."""
        return super().claims(config) and config.get("use_dora") is True

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Adapt `model` with the recipe's settings; see `qlora.adapter.adapt`."""
        return adapt(model, spec_of(settings), seed=seed, layers=self.layers)

    def config(self, model: nn.Module, layers: Mapping[str, Any], base: BaseIdentity) -> dict[str, Any]:
        """Return the fields of PEFT's LoraConfig, with use_dora."""
        return {**config_of(model, layers, base), "use_dora": True}

    def notes(self, model: nn.Module) -> list[str]:
        """Return a remark on layers for which PEFT refuses the adapter."""
        names = taken_for_experts(model, DoraLinear.of(model))
        if not names:
            return super().notes(model)
        return [
            *super().notes(model),
            f"PEFT 0.21 refuses this adapter, because it takes {listed(names)} for experts, for which it has no DoRA; "
            "merge the adapter for other programs",
        ]

    as_lora = AdapterMethod.as_lora

    def check(self, config: Mapping[str, Any], file: Path) -> None:
        """Raise ModelError if a field is unknown or not supported."""
        check_config({**config, "use_dora": False}, file)
