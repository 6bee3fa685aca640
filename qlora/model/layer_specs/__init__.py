"""The architectures whose decoder layers get our own passes, a family a file. A new one needs its file and no more.

Each file has `SPECS`, its layers of transformers' classes.
"""

from importlib import import_module
from pkgutil import iter_modules

from qlora.model.layer_spec import LayerSpec

LAYER_SPECS: dict[str, LayerSpec] = {
    spec.layer: spec
    for family in iter_modules(__path__)
    for spec in import_module(f"{__name__}.{family.name}").SPECS
}
"""by the name of transformers' class"""
