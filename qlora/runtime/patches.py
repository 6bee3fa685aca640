"""Patches of other libraries, each a context manager that undoes its change, also after an error.

Each docstring lists what is changed, which version needs it, the library's source, and when the patch can be removed.
Libraries are imported inside the functions, so that one patch does not load the library of another.
"""

import logging
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

KERNELS_FAILED = "Failed to load CPU gemm_4bit_forward from kernels-community"
"""start of bitsandbytes' warning that it could not import `kernels`"""

_ABSENT = object()


@contextmanager
def kernels_hidden() -> Iterator[None]:
    """Prevent a download of code when bitsandbytes is imported: hide `kernels`, and suppress the warning about it.

    Changes: `sys.modules["kernels"]`, and a filter on the logger of `bitsandbytes.backends.cpu.ops`.
    Needed by: bitsandbytes 0.50. On a CPU with AVX512-BF16, it downloads code from the hub with `kernels` and runs it;
        without `kernels`, its warning is the first line of every command.
    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cpu/ops.py
    Unnecessary once: bitsandbytes downloads at the first call of its 4-bit product, not at import.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_not_about_kernels)
    try:
        with _entry(sys.modules, "kernels", None):  # None makes Python's import fail
            yield
    finally:
        logger.removeFilter(_is_not_about_kernels)


@contextmanager
def compilation_postponed() -> Iterator[None]:
    """Let `torch.compile` compile at the first call of a function that is decorated here, not at the decoration.

    Changes: `torch.compile`.
    Needed by: bitsandbytes 0.50, which decorates four functions of its CPU code when it is imported. Each import then
        loads torch's compiler, which takes longer than all else that bitsandbytes does.
    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/default/ops.py
    Unnecessary once: bitsandbytes compiles when it computes, or `torch.compile` loads its compiler at the first call.
    """
    compiled = torch.compile

    def postponed(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
        if function is None:
            return lambda decorated: postponed(decorated, **settings)
        ready = cache(lambda: compiled(function, **settings))

        @wraps(function)
        def first_call(*args: Any, **kwargs: Any) -> Any:
            return ready()(*args, **kwargs)

        return first_call

    with _attribute(torch, "compile", postponed):
        yield


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters of new modules on the meta device, but not buffers: rotary frequencies must be computed.

    Changes: `torch.nn.Module.register_parameter`.
    Needed by: torch 2.11, with which accelerate's `init_empty_weights` (the same function) fails on fake tensors.
    Source: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/big_modeling.py
    Unnecessary once: torch 2.13 is the oldest supported version; `init_empty_weights` works with it.
    """
    register = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    with _attribute(nn.Module, "register_parameter", register_parameter):
        yield


@contextmanager
def fake_parameters_converted(is_fake: Callable[[Any], bool]) -> Iterator[None]:
    """Let `module.to(dtype)` convert fake parameters, as the models do that keep a norm or a router in float32.

    Args:
        is_fake: returns True for a fake tensor.

    Changes: `torch.nn.Module._apply`, which swaps the contents of fake tensors; here the parameters are replaced.
    Needed by: torch 2.13. A fake tensor has a weak reference, and torch refuses to swap it.
    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py
    Unnecessary once: torch converts the parameters of a module that is built under FakeTensorMode.
    """
    apply = nn.Module._apply

    def convert(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not any(is_fake(parameter) for parameter in module._parameters.values()):
            return apply(module, change, recurse)
        for child in module.children() if recurse else ():
            child._apply(change)
        for name, parameter in module._parameters.items():
            with torch.no_grad():
                changed = None if parameter is None else change(parameter)
            if parameter is not None and changed is not None and changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        module._buffers.update({name: b if b is None else change(b) for name, b in module._buffers.items()})
        return module

    with _attribute(nn.Module, "_apply", convert):
        yield


@contextmanager
def rows_packed(packed: bool) -> Iterator[None]:
    """Set whether transformers treats rows as packed; only for packed rows it makes an attention mask.

    Changes: `transformers.masking_utils.find_packed_sequence_indices`.
    Needed by: transformers 5.24, which infers packing from the values of position ids, and takes fake ids for packed.
    Source: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/masking_utils.py
    Unnecessary once: `create_causal_mask` has an argument for it.
    """
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        indices = find(position_ids)
        return indices if packed else None

    with _attribute(masking_utils, "find_packed_sequence_indices", find_packed_sequence_indices):
        yield


@contextmanager
def quantizer_replaced(name: str, quantizer: type[Any]) -> Iterator[None]:
    """Make transformers' `from_pretrained` use `quantizer` for the quantization method `name`.

    Changes: an entry of `transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING`.
    Needed by: transformers 5.24, whose 4-bit quantizer has only bitsandbytes' default block size.
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


def _is_not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KERNELS_FAILED)
