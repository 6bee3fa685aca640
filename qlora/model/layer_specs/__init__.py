"""Architectures whose decoder layers get our own passes, one family per file. A new family needs only its file.

Each file lists the specs of its decoder layers in `SPECS`.
"""

from importlib import import_module
from pkgutil import iter_modules

from qlora.model.layer_spec import LayerSpec

LAYER_SPECS: dict[str, LayerSpec] = {
    spec.layer: spec
    for family in iter_modules(__path__)
    for spec in import_module(f"{__name__}.{family.name}").SPECS
}
"""specs by the name of transformers' class"""
