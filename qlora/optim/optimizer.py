"""The optimizer of the training loop, over groups of flat parameters."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.optim.flat import FlatGroup
from qlora.optim.methods import METHODS, Update
from qlora.optim.paged import is_paged


class Optimizer:
    """Updates parameters with one of the optimizers in `METHODS`.

    The constructor makes every parameter and its `.grad` a view of a flat tensor. Autograd accumulates into these
    views, so never replace a `.grad` or set it to None; clear gradients with this class's `zero_grad`.

    Args:
        parameters: name -> parameter; the names identify them in a saved state.
        name: a key of `METHODS`, as in a recipe. On a CPU, paged optimizers are not paged.
        betas: coefficients of the running averages.
        eps: added to Adam's denominator; Lion ignores it.
        weight_decay: decoupled; applies to tensors of at least two dimensions, not to norms and biases.
        lr_factors: name -> learning rate of this parameter, as a multiple of that of `step` (the parameter groups of
            LoRA+, Hayou et al. 2024); 1 for names that it does not have.
        exact_sums: sum the gradients of several backward passes in fp32, for any dtype of the parameters; 2 bytes more
            for each bf16 parameter. In bf16 a sum of 512 gradients is wrong by some percent, because small addends are
            rounded away.

    Examples:
        >>> optimizer = Optimizer(trainable_parameters(model), name="paged_adamw_32bit")
        >>> optimizer.zero_grad()
        >>> accumulate(model, micro_batches, ...)
        >>> norm = optimizer.clip(0.3)
        >>> optimizer.step(lr=2e-4)
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        name: str,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_factors: Mapping[str, float] | None = None,
        exact_sums: bool = False,
    ) -> None:
        assert parameters, "an optimizer needs at least one parameter"
        assert len(set(map(id, parameters.values()))) == len(parameters), "a parameter has two names"
        self.name = name
        self.steps = 0
        self._betas = (float(betas[0]), float(betas[1]))
        self._eps = eps
        members: dict[tuple[torch.device, torch.dtype, float, float], dict[str, nn.Parameter]] = {}
        for key, parameter in parameters.items():
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            factor = (lr_factors or {}).get(key, 1.0)
            members.setdefault((parameter.device, parameter.dtype, decay, factor), {})[key] = parameter
        self._groups = [
            FlatGroup(group, METHODS[name], decay, exact_sums, lr_factor=factor)
            for (_, _, decay, factor), group in members.items()
        ]
        self._scale = torch.ones(1)

    def gradients(self) -> list[Tensor]:
        """Return the flat gradient tensors, one per group. Distributed processes sum them before `clip`."""
        return [group.gradient for group in self._groups]

    def zero_grad(self) -> None:
        """Set all gradients to zero in place, and reset the scale of the last `clip`."""
        self._scale = torch.ones(1)
        for gradient in self.gradients():
            gradient.zero_()

    def grad_norm(self) -> Tensor:
        """Return the global L2 norm of all gradients, a 0-dim fp32 tensor, without a device synchronisation."""
        for group in self._groups:
            group.check_gradients()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def clip(self, max_norm: float) -> Tensor:
        """Make the next `step` scale the gradients so that their global norm is at most `max_norm`.

        `step` applies the factor in fp32. In place on bf16 gradients, the factor would be rounded to 8 bits and
        every gradient would be rounded a second time.

        Returns:
            The norm before clipping, as in `grad_norm`, without a device synchronisation.
        """
        norm = self.grad_norm()
        self._scale = (max_norm / norm.clamp_min(1e-30)).clamp_max(1.0).view(1)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters once, with the learning rate `lr` times the factor of each."""
        self.steps += 1
        for group in self._groups:
            own = lr * group.lr_factor
            group.step(Update(own, self.steps, self._betas, self._eps, group.weight_decay), self._scale)

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer state as views with keys `<parameter>.<kind>`. Save or copy them before the next step.

        The kinds, in the parameter's shape unless noted:
            `value` (bf16), `remainder` (int16): together the fp32 master copy of a bf16 parameter.
            `moment1`, `moment2`: fp32, or 8-bit codes [blocks, 256].
            `absmax1`, `absmax2`: scales [blocks] of 8-bit moments.

        The key `steps.<optimizer name>` holds the number of updates so far.
        """
        state = {f"steps.{self.name}": torch.tensor(self.steps)}
        for group in self._groups:
            state |= group.state()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state from `state` exactly, including the values of bf16 parameters.

        Values are copied into the existing tensors, so paged states stay paged.

        Raises:
            ModelError: The state belongs to another optimizer or to other parameters. Nothing is changed then.
        """
        own = self.state()
        self._check_fits(own, state)
        counter = f"steps.{self.name}"
        self.steps = int(state[counter])
        for key in own.keys() - {counter}:
            own[key].copy_(state[key])

    def _check_fits(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Raise ModelError with the first difference in optimizer, names, shapes or dtypes."""
        writers = [key.removeprefix("steps.") for key in saved if key.startswith("steps.")]
        if writers != [self.name]:
            raise ModelError(
                f"the saved optimizer state belongs to {' and '.join(writers) or 'no optimizer of qlora'}, but "
                f"optimizer.name is {self.name}. Resume with the optimizer that wrote it, or start again with --fresh"
            )
        for key in sorted(own.keys() | saved.keys()):
            mine, theirs = _describe(own.get(key)), _describe(saved.get(key))
            if mine != theirs:
                raise ModelError(
                    f"the saved optimizer state does not fit this run: {key} is {theirs} in the checkpoint, {mine} "
                    "here. Resume with the base and adapter settings that wrote it, or start again with --fresh"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (kind, flat tensor): parameters, gradients, remainder, moments (with scales and tables)."""
        for group in self._groups:
            yield "parameters", group.value
            yield "gradients", group.gradient
            for kind, tensor in (group.states | group.tables).items():
                yield "remainder" if kind == "remainder" else "moments", tensor

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of each kind in `tensors`."""
        sizes = {"parameters": 0, "gradients": 0, "remainder": 0, "moments": 0}
        for kind, tensor in self.tensors():
            sizes[kind] += tensor.nbytes
        return sizes

    def paged_bytes(self) -> int:
        """Return the part of `state_bytes` in managed memory, which torch's allocator does not count."""
        return sum(tensor.nbytes for _, tensor in self.tensors() if is_paged(tensor))


def _describe(tensor: Tensor | None) -> str:
    """Return a tensor's dtype and shape as text."""
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
