"""Changes to other libraries, each a context manager that takes its change back, also after an error.

Each says what it changes, what needs it, where the library does what is changed, and when it is no longer needed.
Libraries are imported late: one that is patched here may not be wanted where another is.
"""

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

KERNELS_FAILED = "Failed to load CPU gemm_4bit_forward from kernels-community"
"""how bitsandbytes begins its warning that it could not import `kernels`"""

_ABSENT = object()


@contextmanager
def kernels_hidden() -> Iterator[None]:
    """bitsandbytes downloads no code while it is imported: nobody can import `kernels`, and no warning says so.

    Changes: `sys.modules["kernels"]`, and a filter on the logger of `bitsandbytes.backends.cpu.ops`.
    Needed by: bitsandbytes 0.50. On a CPU with AVX512-BF16 it asks `kernels` for code from the hub and runs it; without
        `kernels` its warning is the first line of every command.
    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cpu/ops.py
    Unnecessary once: bitsandbytes asks when its own 4-bit product is called for the first time, not on import.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_says_more)
    try:
        with _entry(sys.modules, "kernels", None):  # Python's own way to say: this import fails
            yield
    finally:
        logger.removeFilter(_says_more)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made within have parameters on the meta device and real buffers: rotary frequencies are computed.

    Changes: `torch.nn.Module.register_parameter`.
    Needed by: torch 2.11, with which accelerate's `init_empty_weights`, which does the same, fails on fake tensors.
    Source: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/big_modeling.py
    Unnecessary once: torch 2.13 is the oldest that is supported, with which `init_empty_weights` works.
    """
    register = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    with _attribute(nn.Module, "register_parameter", register_parameter):
        yield


@contextmanager
def rows_packed(packed: bool) -> Iterator[None]:
    """Tell transformers whether rows hold several documents: only then does it make an attention mask.

    Changes: `transformers.masking_utils.find_packed_sequence_indices`.
    Needed by: transformers 5.24, which reads it from the values of position ids, and takes fake ones for packed.
    Source: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/masking_utils.py
    Unnecessary once: `create_causal_mask` takes it as an argument.
    """
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        found = find(position_ids)
        return found if packed else None

    with _attribute(masking_utils, "find_packed_sequence_indices", find_packed_sequence_indices):
        yield


@contextmanager
def quantizer_replaced(name: str, quantizer: type[Any]) -> Iterator[None]:
    """transformers' `from_pretrained` quantizes with `quantizer` in place of its own of that name.

    Changes: an entry of `transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING`.
    Needed by: transformers 5.24, whose 4-bit quantizer leaves the block size at bitsandbytes' default.
    Source: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/quantizers/auto.py
    Unnecessary once: `BitsAndBytesConfig` has a block size.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    with _entry(AUTO_QUANTIZER_MAPPING, name, quantizer):
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _entry(table: MutableMapping[str, Any], key: str, value: object) -> Iterator[None]:
    before = table.get(key, _ABSENT)
    table[key] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del table[key]
        else:
            table[key] = before


def _says_more(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KERNELS_FAILED)
