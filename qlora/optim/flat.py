"""Flat storage: parameters end to end in one tensor, their gradients and optimizer states in further tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qlora.optim import paged
from qlora.optim.methods import Method, Update, kernel
from qlora.runtime import gpu
from qlora.runtime.device import on_cuda
from qlora.runtime.fake import represented_device

BLOCK_SIZE = 256
"""Alignment of each parameter, in elements. It is the block of bitsandbytes' 8-bit states, so no two parameters
share a scale. It also keeps the alignment of torch's own allocator (512 bytes)."""

CHUNK_SIZE = 2**24
"""Elements updated at once. It limits the fp32 copy of bf16 gradients to 64 MiB for any adapter size, and it is
within the int32 range of bitsandbytes' kernels."""


class FlatGroup:
    """Flat storage for the parameters of one device, dtype, weight decay and learning rate.

    Padding between parameters has zero gradients: it remains zero and adds nothing to a norm.

    Attributes:
        value: [n] in the parameters' dtype. n is the sum of their sizes, each rounded up to BLOCK_SIZE.
        gradient: [n] in the parameters' dtype, or fp32 with `exact_sums`.
        states: `remainder` [n] int16 for bf16 parameters; `moment1`, `moment2` [n] fp32 or uint8; `absmax1`,
            `absmax2` [n / BLOCK_SIZE] fp32.
        tables: `Method.tables`; not part of the saved state.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        method: Method,
        weight_decay: float,
        exact_sums: bool = False,
        lr_factor: float = 1.0,
    ) -> None:
        self.parameters = dict(parameters)
        self.method = method
        self.weight_decay = weight_decay
        self.lr_factor = lr_factor
        first = next(iter(self.parameters.values()))
        self.device = first.device
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, parameter in self.parameters.items():
            self.offsets[name] = self.size
            self.size += -(-parameter.numel() // BLOCK_SIZE) * BLOCK_SIZE

        self.value = torch.zeros(self.size, dtype=first.dtype, device=self.device)
        for name, parameter in self.parameters.items():
            view = self._view(self.value, name)
            view.copy_(parameter.detach())
            parameter.data = view
        dtype = torch.float32 if exact_sums else first.dtype
        # after the loop, which freed the old parameters
        self.gradient = torch.zeros(self.size, dtype=dtype, device=self.device)
        self._gradient_views: list[Tensor] = []
        for name, parameter in self.parameters.items():
            parameter.grad = None  # an earlier one can have another dtype
            parameter.grad_dtype = dtype
            parameter.grad = self._view(self.gradient, name)
            self._gradient_views.append(parameter.grad)

        assert first.dtype in (torch.bfloat16, torch.float32), "only fp32 and bf16 are supported"
        self.states = self._zero_states(has_remainder=first.dtype == torch.bfloat16)
        self.tables = method.tables(self.device)

    def step(self, update: Update, scale: Tensor) -> None:
        """Update the parameters with the gradients times `scale` [1] fp32, chunk by chunk."""
        self.check_gradients()
        step_in_place = kernel(self.method, self.device)
        scale = scale.to(self.device)
        for start in range(0, self.size, CHUNK_SIZE):
            stop = min(start + CHUNK_SIZE, self.size)
            states = {kind: self._part(tensor, start, stop) for kind, tensor in self.states.items()}
            for kind, part in states.items():
                if paged.is_paged(self.states[kind]):
                    paged.prefetch(part)
            value = self.value[start:stop]
            gradient = self.gradient[start:stop] * scale  # fp32 for any gradient dtype
            remainder = states.get("remainder")
            master = value if remainder is None else joined(value, remainder)
            step_in_place(self.method, master, gradient, states | self.tables, update)
            if remainder is not None:
                split(master, value, remainder)

    def check_gradients(self) -> None:
        """Assert that every `.grad` is still our view; autograd replaces a `.grad` set to None, unseen by `step`."""
        pairs = zip(self.parameters.values(), self._gradient_views, strict=True)
        assert all(parameter.grad is view for parameter, view in pairs), (
            ".grad was replaced; clear gradients only with Optimizer.zero_grad()"
        )

    def state(self) -> dict[str, Tensor]:
        """Return views `<parameter>.<kind>` of all states, and of the values if they have a remainder."""
        flat = {"value": self.value, **self.states} if "remainder" in self.states else self.states
        return {
            f"{name}.{kind}": self._view(tensor, name)
            for name in self.parameters
            for kind, tensor in flat.items()
        }

    def _zero_states(self, has_remainder: bool) -> dict[str, Tensor]:
        """Allocate the states; in managed memory if the optimizer is paged, on a GPU that pages, the group large."""
        is_paged = self.method.paged and on_cuda(self.value) and self.size >= paged.MIN_SIZE
        is_paged = is_paged and gpu.can_page(represented_device(self.device))
        states: dict[str, Tensor] = {}

        def add(kind: str, dtype: torch.dtype) -> None:
            zeros = paged.paged_zeros if is_paged else torch.zeros
            states[kind] = zeros(self.size, dtype=dtype, device=self.device)

        if has_remainder:
            add("remainder", torch.int16)
        for i in self.method.moments:
            add(f"moment{i}", torch.uint8 if self.method.bits == 8 else torch.float32)
            if self.method.bits == 8:
                states[f"absmax{i}"] = torch.zeros(self.size // BLOCK_SIZE, device=self.device)
        return states

    def _part(self, flat: Tensor, start: int, stop: int) -> Tensor:
        """Return the part of a flat tensor (one entry per element or per block) for the elements start..stop."""
        elements = self.size // flat.numel()
        return flat[start // elements : stop // elements]

    def _view(self, flat: Tensor, name: str) -> Tensor:
        """Return a parameter's part of a flat tensor: scales [blocks], codes [blocks, 256], others in its own shape.

        Codes include the padding of the last block, because it affects the block's next scale.
        """
        parameter, start = self.parameters[name], self.offsets[name]
        blocks = -(-parameter.numel() // BLOCK_SIZE)
        if flat.dtype == torch.uint8:
            return flat[start : start + blocks * BLOCK_SIZE].view(blocks, BLOCK_SIZE)
        if flat.numel() != self.size:
            return flat[start // BLOCK_SIZE :][:blocks]
        return flat[start : start + parameter.numel()].view(parameter.shape)


def joined(value: Tensor, remainder: Tensor) -> Tensor:
    """Combine bf16 `value` [n] and int16 `remainder` [n] into the fp32 master copy [n]; the inverse of `split`.

    A bf16 number is the upper half of an fp32 number, and the rounding error fits into 16 bits. A bf16 parameter and
    its remainder therefore hold an exact fp32 master copy in four bytes instead of six.
    """
    bits = value.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(remainder).view(torch.float32)


def split(master: Tensor, value: Tensor, remainder: Tensor) -> None:
    """Split fp32 `master` [n] into a bf16 value, rounded to nearest (ties away from zero), and a remainder."""
    bits = master.view(torch.int32)
    upper = bits.add(1 << 15).bitwise_right_shift_(16)
    value.view(torch.int16).copy_(upper)
    remainder.copy_(bits.sub_(upper.bitwise_left_shift_(16)))
