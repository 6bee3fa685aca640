"""Grouping of layers by kind, such as `q_proj`, and by block of the model."""

import re
from collections import Counter
from collections.abc import Iterable


def places(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return the kind and the block of every layer: `model.layers.3.self_attn.q_proj` is `q_proj` in block 3.

    The block is the first number in a name, or 0 if there is none. Further numbers, such as those of experts, become
    `*`. The kind is the last part of the rest, or the whole rest if two kinds end in the same part.
    """
    parts = {name: _parts(name) for name in names}
    stacks = {stack for stack, _, _ in parts.values() if stack}
    kinds = {}
    for name, (stack, _, rest) in parts.items():
        kinds[name] = f"{stack}.{rest}" if stack and len(stacks) > 1 else rest
    leaves = Counter(kind.rpartition(".")[2] for kind in set(kinds.values()))
    short = {kind: leaf if leaves[leaf := kind.rpartition(".")[2]] == 1 else kind for kind in kinds.values()}
    return {name: (short[kinds[name]], parts[name][1]) for name in parts}


def _parts(name: str) -> tuple[str, int, str]:
    """Split a name into the part before the block number, the block number, and the rest."""
    match = re.match(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
    if match is None:
        return "", 0, name
    stack, block, rest = match.groups()
    return stack or "layers", int(block), re.sub(r"\b\d+\b", "*", rest)
