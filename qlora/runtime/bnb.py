"""The only door to bitsandbytes: imports it without its download, and without the warning about it.

What it would download is a kernel of its own 4-bit product, which we never call: a run must start without a network
and run no code that nobody asked for. bitsandbytes itself works as it does without `kernels`.
"""

from qlora.runtime.patches import kernels_hidden

with kernels_hidden():
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
