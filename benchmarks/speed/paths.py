"""Finds out which code a step takes: the kernels that run, and the attention that torch chooses.

A benchmark of kernels that fell back to plain torch, in silence, would measure something else than its reader thinks.
"""

from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from qlora.kernels import FusedOp, cross_entropy, gate, grouped, norm, rotary
from qlora.kernels.dispatch import wanted
from qlora.quantization import nf4

KERNELS: tuple[FusedOp, ...] = (
    gate.SILU_PRODUCT, gate.SILU_GRADIENTS, norm.NORMALIZE, norm.NORMALIZE_LATE, norm.NORMALIZE_GRADIENT,
    rotary.ROTATE, rotary.ROTATE_PAIRS, cross_entropy.LOSS, grouped.PRODUCT, grouped.OUTER, nf4.DEQUANTIZE,
)  # fmt: skip
ATTENTION = ("attention", "_varlen_attn")
"""parts of the names of torch's attention operators"""


def kernel_states(device: str) -> dict[str, str]:
    """Return the state of every kernel in this process: `runs`, `fell back`, `not used`, or `off`; empty on a CPU."""
    if device != "cuda":
        return {}
    found: dict[str, str] = {}
    for work in KERNELS:
        states = set(work.states().values())
        state = "fell back" if "fell back" in states else "runs" if states else "not used"
        if found.get(work.kernel) in (None, "not used") or state == "fell back":
            found[work.kernel] = state
    return found if wanted() else dict.fromkeys(found, "off")


def check_kernels(states: dict[str, str]) -> None:
    """Raise RuntimeError if a kernel fell back to plain torch: the measurement is not that of our kernels."""
    if fallen := sorted(name for name, state in states.items() if state == "fell back"):
        raise RuntimeError(f"these kernels fell back to plain torch: {', '.join(fallen)}")


class AttentionSeen(TorchDispatchMode):
    """Collects the names of the attention operators that run inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note its name."""
        name = str(func)
        if any(part in name for part in ATTENTION):
            self._names.add(name.rsplit(".", 1)[0])
        return func(*args, **kwargs or {})

    def __str__(self) -> str:
        return ", ".join(sorted(self._names)) or "none"
