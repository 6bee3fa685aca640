"""The optimizer that the loop holds: groups of flat parameters, one step, one norm, one state."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.optim.flat import FlatGroup
from qlora.optim.methods import METHODS, Update
from qlora.optim.paged import is_paged


class Optimizer:
    """Steps parameters by the optimizer called `name`, one of `METHODS`.

    On construction every parameter and its `.grad` become views of flat tensors; autograd accumulates into
    them in place, so `.grad` must never be replaced or set to None afterwards: use `zero_grad` of this one.

    Args:
        parameters: name -> parameter; the names identify them in a saved state.
        name: as in a recipe. On a CPU, paged optimizers are ordinary ones.
        betas, eps: of Adam; Lion has no eps.
        weight_decay: decoupled; for matrices only (two dimensions and more), not for norms and biases.

    Example:
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
    ) -> None:
        assert parameters, "an optimizer needs at least one parameter"
        assert len(set(map(id, parameters.values()))) == len(parameters), "a parameter under two names"
        self.name = name
        self.steps = 0
        self._betas = (float(betas[0]), float(betas[1]))
        self._eps = eps
        members: dict[tuple[torch.device, torch.dtype, float], dict[str, nn.Parameter]] = {}
        for key, parameter in parameters.items():
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            members.setdefault((parameter.device, parameter.dtype, decay), {})[key] = parameter
        self._groups = [FlatGroup(group, METHODS[name], decay) for (_, _, decay), group in members.items()]
        self._scale = torch.ones(1)

    def gradients(self) -> list[Tensor]:
        """The flat gradient tensors, one a group: what processes sum before `clip`."""
        return [group.gradient for group in self._groups]

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place, and forget the `clip` that was made for them."""
        self._scale = torch.ones(1)
        for gradient in self.gradients():
            gradient.zero_()

    def grad_norm(self) -> Tensor:
        """Global L2 norm of all gradients, a 0-dim fp32 tensor; nothing waits for the device."""
        for group in self._groups:
            group.check_gradients()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def clip(self, max_norm: float) -> Tensor:
        """Make `step` scale these gradients down to a global norm of `max_norm`.

        The factor is applied in fp32 inside `step`. Applied to bf16 gradients in place it would itself be
        rounded to 8 bits, and round every gradient a second time.

        Returns:
            The norm before, as `grad_norm`; nothing waits for the device.
        """
        norm = self.grad_norm()
        self._scale = (max_norm / norm.clamp_min(1e-30)).clamp_max(1.0).view(1)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of all parameters with the learning rate `lr`."""
        self.steps += 1
        for group in self._groups:
            group.step(Update(lr, self.steps, self._betas, self._eps, group.weight_decay), self._scale)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the parameters: views by `<parameter>.<kind>`.

        Kinds: `value` (bf16) and `remainder` (int16), together an fp32 master copy of a parameter in bf16, and
        `moment1`, `moment2` (fp32), all in the parameter's shape; 8-bit moments are codes [blocks, 256] with
        scales `absmax1`, `absmax2` [blocks].
        One more key, `steps.<optimizer name>`: the updates made. Save or copy the views before the next step.
        """
        state = {f"steps.{self.name}": torch.tensor(self.steps)}
        for group in self._groups:
            state |= group.state()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave, exactly. Parameters in bf16 are restored with it.

        Values are copied into the existing tensors, so paged states stay paged.

        Raises:
            ModelError: the state is of another optimizer or of other parameters; nothing has changed then.
        """
        own = self.state()
        self._check_fits(own, state)
        counter = f"steps.{self.name}"
        self.steps = int(state[counter])
        for key in own.keys() - {counter}:
            own[key].copy_(state[key])

    def _check_fits(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
        """Raise ModelError naming the first difference, in the optimizer, a name, a shape or a dtype."""
        writers = [key.removeprefix("steps.") for key in saved if key.startswith("steps.")]
        if writers != [self.name]:
            raise ModelError(
                f"the saved optimizer state is of {' and '.join(writers) or 'no optimizer of qlora'}, but "
                f"optimizer.name is {self.name}. Resume with the one that wrote it, or start with --fresh"
            )
        for key in sorted(own.keys() | saved.keys()):
            mine, theirs = _describe(own.get(key)), _describe(saved.get(key))
            if mine != theirs:
                raise ModelError(
                    f"the saved optimizer state does not fit: {key} is {theirs} there, {mine} here. "
                    "Resume with the base and adapter settings that wrote it, or start with --fresh"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every flat tensor with its kind: parameters, gradients, remainder, moments (scales and tables too)."""
        for group in self._groups:
            yield "parameters", group.value
            yield "gradients", group.gradient
            for kind, tensor in (group.states | group.tables).items():
                yield "remainder" if kind == "remainder" else "moments", tensor

    def state_bytes(self) -> dict[str, int]:
        """Bytes held, by kind, as in `tensors`."""
        sizes = {"parameters": 0, "gradients": 0, "remainder": 0, "moments": 0}
        for kind, tensor in self.tensors():
            sizes[kind] += tensor.nbytes
        return sizes

    def paged_bytes(self) -> int:
        """The part of `state_bytes` in managed memory, of which torch's allocator knows nothing."""
        return sum(tensor.nbytes for _, tensor in self.tensors() if is_paged(tensor))


def _describe(tensor: Tensor | None) -> str:
    """A tensor's dtype and shape in words."""
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
