"""Tensors that are trained beside the adapted layers, and stored in the same file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def trained_parts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters trained beside the adapted layers, by their names in the file."""
    return {}


def stored_parts(config: Mapping[str, Any]) -> list[str]:
    """Return the names in the file of the tensors that `config` says were trained beside the adapted layers."""
    return []


def load_parts(model: nn.Module, parts: Mapping[str, Tensor], file: Path) -> None:
    """Load the tensors `parts`, by their names in `file`, into `model`."""
