"""The only import of bitsandbytes, which prevents its download at import and the warning about it.

bitsandbytes would download a kernel for its 4-bit product, which qlora does not use. A run must start without a
network, and must not run code that the user did not ask for. bitsandbytes works without this kernel. Its import would
also load torch's compiler; see `compilation_postponed`.
"""

from qlora.runtime.patches import compilation_postponed, kernels_hidden

with kernels_hidden(), compilation_postponed():
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
