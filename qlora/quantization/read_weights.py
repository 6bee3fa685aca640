"""Linear layers whose weight or bias the model's own code reads, such as the output projection of Mamba.

Such code hands the weight to a kernel or changes it. It would take packed NF4 codes for numbers, and pass over an
adapter around the layer. So these layers are neither quantized nor adapted. Which branch of the code runs depends on
the device and the installed kernels, so the code itself is searched, not one pass through it: an adapter then has the
same layers on every machine.
"""

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType

from torch import nn

READ = ("weight", "bias")

PREPARE = ("init", "reset", "tie")
"""parts of the names of methods that prepare a model for its first step"""

LIBRARIES = ("torch.", "transformers.modeling_utils.", "bitsandbytes.", "qlora.")
"""modules whose classes call the layers inside them, or are handled elsewhere (`nn.MultiheadAttention`)"""


def read_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers of `model` whose weight or bias other code reads.

    Code that prepares a model, such as `_init_weights`, does not count.
    """
    found = set()
    for name, module in model.named_modules():
        # Bloom reads weights only if asked to repeat the roundings of its own training on several GPUs
        read = _reads(type(module))  # type: ignore[arg-type]  # mypy takes a class for unhashable
        if not read or getattr(module, "slow_but_exact", None) is False:
            continue
        for inside, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and (inside in read or f".{inside}".endswith(read)):
                found.add(f"{name}.{inside}" if name else inside)
    return found


@cache
def _reads(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the layers whose weight or bias the class reads: `name` of its own, `.parent.name` of one further down."""
    found = set()
    for code in _code(kind):
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


def _code(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the code of all methods of a class, without those that prepare a model."""
    for owner in kind.__mro__:
        if f"{owner.__module__}.".startswith(LIBRARIES):
            continue
        for name, method in vars(owner).items():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if not inspect.isfunction(function) or any(part in name for part in PREPARE):
                continue
            codes = [function.__code__]
            while codes:
                code = codes.pop()
                if not set(READ).isdisjoint(code.co_names):
                    yield code
                codes += [value for value in code.co_consts if isinstance(value, CodeType)]
