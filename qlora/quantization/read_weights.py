"""Linear layers whose weight or bias the model's own code reads, such as the output projection of Mamba.

Such code hands the weight to a kernel or changes it. It would take packed NF4 codes for numbers, and pass over an
adapter around the layer. So these layers are neither quantized nor adapted. Which branch of the code runs depends on
the device and the installed kernels, so the code itself is searched, not one pass through it: an adapter then has the
same layers on every machine.
"""

import dis
import inspect
from collections.abc import Mapping
from functools import cache
from types import CodeType

from torch import nn

READ = ("weight", "bias")

LIBRARIES = ("torch.", "transformers.modeling_utils.", "bitsandbytes.", "qlora.")
"""modules whose classes call the layers inside them, or are handled elsewhere (`nn.MultiheadAttention`)"""


def read_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers of `model` whose weight or bias other code reads in a forward pass.

    Code that no forward pass reaches does not count, such as `_init_weights`, or diffusers' `fuse_projections`.
    """
    kinds: dict[nn.Module, type] = {module: type(module) for module in model.modules()}
    reached = _reached(set(kinds.values()))
    found = set()
    for name, module in model.named_modules():
        read = _reads(kinds[module], reached)
        # Bloom reads weights only if asked to repeat the roundings of its own training on several GPUs
        if not read or getattr(module, "slow_but_exact", None) is False:
            continue
        for inside, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and (inside in read or f".{inside}".endswith(read)):
                found.add(f"{name}.{inside}" if name else inside)
    return found


def _reached(kinds: set[type]) -> frozenset[str]:
    """Return the names of the methods that `forward` reaches: it names them, or a method does that it names.

    A method is followed by its name alone, in all classes of the model, so some that no pass calls count too.
    """
    methods = [_methods(kind) for kind in kinds]
    reached: set[str] = set()
    new = {"forward", "__call__"}
    while new:
        reached |= new
        named = {
            word
            for own in methods
            for name in new & own.keys()
            for code in own[name]
            for word in code.co_names
        }
        new = (named & {name for own in methods for name in own}) - reached
    return frozenset(reached)


@cache
def _reads(kind: type, reached: frozenset[str]) -> tuple[str, ...]:
    """Return the layers whose weight or bias the class reads: `name` of its own, `.parent.name` of one further down."""
    found = set()
    for code in (code for name, codes in _methods(kind).items() if name in reached for code in codes):
        if set(READ).isdisjoint(code.co_names):
            continue
        chain: list[str] = []
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_ATTR":
                if step.argval in READ and len(chain) > 1:
                    own = chain[:-1] == ["self"]
                    found.add(chain[-1] if own else "." + ".".join(chain[1:][-2:]))
                chain.append(step.argval)
            else:
                chain = [str(step.argval) if step.opname.startswith("LOAD_FAST") else ""]
    return tuple(sorted(found))


@cache
def _methods(kind: type) -> Mapping[str, list[CodeType]]:
    """Return the code of the methods of a class by name, those of its bases and of functions inside included."""
    found: dict[str, list[CodeType]] = {}
    for owner in kind.__mro__:
        if f"{owner.__module__}.".startswith(LIBRARIES):
            continue
        for name, method in vars(owner).items():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if not inspect.isfunction(function):
                continue
            codes = [function.__code__]
            while codes:
                code = codes.pop()
                found.setdefault(name, []).append(code)
                codes += [value for value in code.co_consts if isinstance(value, CodeType)]
    return found
