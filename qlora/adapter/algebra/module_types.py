"""Layers as a person groups them: by kind, such as `q_proj`, and by the block of the model that they stand in."""

import re
from collections import Counter
from collections.abc import Iterable


def places(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The kind and the block of every layer: `model.layers.3.self_attn.q_proj` is `q_proj` in block 3.

    The first number in a name is its block, and 0 without one; further numbers, as those of experts, become `*`.
    A kind is the last part of what follows, and as much before it as it takes to tell kinds apart.
    """
    found = {name: _parts(name) for name in names}
    stacks = {stack for stack, _, _ in found.values() if stack}
    kinds = {}
    for name, (stack, _, rest) in found.items():
        kinds[name] = f"{stack}.{rest}" if stack and len(stacks) > 1 else rest
    leaves = Counter(kind.rpartition(".")[2] for kind in set(kinds.values()))
    short = {kind: leaf if leaves[leaf := kind.rpartition(".")[2]] == 1 else kind for kind in kinds.values()}
    return {name: (short[kinds[name]], found[name][1]) for name in found}


def _parts(name: str) -> tuple[str, int, str]:
    """What stands before the block's number, the number, and what follows."""
    match = re.match(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
    if match is None:
        return "", 0, name
    stack, block, rest = match.groups()
    return stack or "layers", int(block), re.sub(r"\b\d+\b", "*", rest)
