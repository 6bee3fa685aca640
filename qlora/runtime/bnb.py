"""The only door to bitsandbytes: imports it without its download, and without the warning about it.

On a CPU with AVX512-BF16, bitsandbytes 0.50 asks the package `kernels` for a kernel of its own 4-bit product while it
is imported. Where `kernels` is installed, that downloads code from the hub and runs it; where it is not, a warning is
the first line of every command. We never call that product, so neither should happen because of us: a run must start
without a network and run no code that nobody asked for. bitsandbytes itself works as it does without `kernels`.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ABSENT = "Failed to load CPU gemm_4bit_forward from kernels-community"


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Nobody can import `kernels` meanwhile, and bitsandbytes does not say that it could not."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missing = object()
    before = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own way to say: this import fails
    logger.addFilter(_is_of_interest)
    try:
        yield
    finally:
        logger.removeFilter(_is_of_interest)
        if before is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def _is_of_interest(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ABSENT)


with _without_kernels():
    from bitsandbytes import functional
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit

__all__ = [
    "Linear4bit",
    "Params4bit",
    "QuantState",
    "create_dynamic_map",
    "functional",
    "get_4bit_type",
]
