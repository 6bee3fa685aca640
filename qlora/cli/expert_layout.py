"""`qlora adapter export` of a mixture's experts: matrices of each expert, or all experts in one tensor."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from qlora.adapter.algebra.tensors import Adapter

Layout = Literal["apart", "stacked"]
Experts = Annotated[
    Layout | None,
    typer.Option(
        "--experts",
        help="Experts of a mixture: apart, with A and B for each of their matrices, or stacked, as in PEFT's layout. "
        "Default: as in the files of the base.",
    ),
]
ExpertBase = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base whose config.json tells the experts' names. Default: the adapter's own."
    ),
]


def with_experts(adapter: "Adapter", layout: Layout | None, base: str | None) -> "Adapter":
    """Return the adapter with its experts in a layout; None means that of the files of `base`, or of its own base.

    Raises:
        UsageError: the adapter has no experts, but a layout.
        ModelError: the base is needed, and its config.json cannot be read or is of another model.
    """
    if not adapter.experts:
        for option, value in (("--experts", layout), ("--base", base)):
            if value is not None:
                raise UsageError(f"{option}: the adapter has no stacked experts of a mixture; leave it out")
        return adapter
    if layout == "stacked":
        if base is not None:
            raise UsageError("--base: not read with --experts stacked; leave it out")
        return adapter
    from qlora.adapter.algebra.apart import apart, are_apart

    model = _architecture(adapter, base)
    if layout == "apart" or are_apart(adapter, model):
        return apart(adapter, model)
    said = "the experts stay stacked, as in the files of the base; --experts apart writes A and B for each"
    return replace(adapter, note="; ".join(filter(None, [adapter.note, said])))


def _architecture(adapter: "Adapter", given: str | None) -> "nn.Module":
    """Return the base that the user gave, else the recorded base, without its weights."""
    from qlora.model.load import load_architecture
    from qlora.recipe import Base

    if given == "":
        raise UsageError("--base: it is empty; give a folder or a hub id")
    if given is not None:
        return load_architecture(Base(model=given))
    name, revision = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        raise ModelError("the adapter records no base, whose config.json is needed: give it with --base")
    try:
        return load_architecture(Base(model=name, revision=revision))
    except ModelError as error:
        raise ModelError(
            f"the adapter's base {name!r}, whose config.json is needed, cannot be read: {error}. Give it with --base"
        ) from error
