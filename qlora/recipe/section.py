"""Base class of the sections of a recipe, and the types of their keys."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
# Within these limits, float32 holds a number and its product with another of an ordinary size.
Factor = Annotated[float, Field(ge=1e-30, le=1e6)]
FactorOrZero = Annotated[float, Field(ge=0, le=1e6)]
Norm = Annotated[float, Field(ge=1e-9, le=1e30)]
"""norm of a gradient, which would vanish beside `optimizer.eps` if it were smaller"""
Decay = Annotated[float, Field(ge=0, lt=1)]

Targets = Literal["attention", "experts", "all-linear"] | Annotated[list[Text], Field(min_length=1)]

DEVICE_PATTERN = r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"
Device = Annotated[str, Field(pattern=DEVICE_PATTERN)]


class Section(BaseModel):
    """A group of recipe keys. A key that is a word of Python, such as `from`, is the alias of a field."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        serialize_by_alias=True,
    )  # fmt: skip
