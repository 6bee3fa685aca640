"""Digests of a base in memory, as it is without its adapter, so that a plain module is known again.

The digests cover every parameter and persistent buffer of the frozen model, by name. The tensors of adapted layers
count under the names that they have in the base, and the adapter's own tensors do not count. So the digests are the
same before `adapt`, after it, and after training. NF4 weights count as their codes and statistics.
"""

import json
from collections.abc import Collection
from itertools import chain

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.digest import digest, sampled
from qlora.runtime.fake import is_fake

Digests = dict[str, tuple[str, str]]
"""dtype and shape, and digest of the content, of each tensor by name"""


def base_digests(model: nn.Module) -> Digests | None:
    """Return the digests of the base under the adapter of `model`; None if a tensor has no content (meta, fake)."""
    if any(tensor.is_meta or is_fake(tensor) for tensor in chain(model.parameters(), model.buffers())):
        return None
    layers = AdaptedLayer.of(model)
    named = ((_name_in_base(key, layers), tensor) for key, tensor in model.state_dict().items())
    return {
        name: (f"{tensor.dtype} {list(tensor.shape)}", _content(tensor))
        for name, tensor in named
        if name is not None and isinstance(tensor, Tensor)
    }


def remember_base(model: nn.Module) -> None:
    """Keep the digests of the base with `model`, which gets its adapter next, for `BaseIdentity.of` and `changed`."""
    model.base_digests = base_digests(model)  # type: ignore[assignment]


def remembered_base(model: nn.Module) -> Digests | None:
    """Return the digests of the base as it was when `model` got its adapter, else as it is now."""
    remembered: Digests | None = getattr(model, "base_digests", None) if AdaptedLayer.of(model) else None
    return remembered or base_digests(model)


def memory_digest(model: nn.Module) -> str | None:
    """Return one digest of the base of `model`: class, names, dtypes, shapes and content; None without content."""
    found = remembered_base(model)
    if not found:
        return None
    lines = [[name, *parts] for name, parts in sorted(found.items())]
    return digest(json.dumps(line).encode() for line in [[type(model).__name__], *lines]) + " (in memory)"


def changed(model: nn.Module) -> list[str]:
    """Return the names of the base's tensors that have changed since `model` got its adapter, such as statistics.

    A tensor that has another dtype now, because the model was cast, is not compared.
    """
    before: Digests | None = getattr(model, "base_digests", None)
    now = base_digests(model) if before else None
    if not before or not now:
        return []
    return [
        name
        for name, (form, content) in now.items()
        if name in before and before[name][0] == form and before[name][1] != content
    ]


def _name_in_base(key: str, layers: Collection[str]) -> str | None:
    """Return the name that the tensor `key` has without the adapter; None for a tensor of the adapter."""
    parts = key.split(".")
    for length in range(len(parts)):
        prefix = ".".join(parts[:length])
        if prefix in layers:
            inside = parts[length:]
            return ".".join([*parts[:length], *inside[1:]]) if inside[0] == "base" else None
    return key


def _content(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    offsets, size = sampled(len(flat))
    samples = torch.cat([flat[offset : offset + size] for offset in offsets]).cpu()
    return digest([samples.numpy().tobytes()])
