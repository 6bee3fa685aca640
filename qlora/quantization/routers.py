"""Routers of mixtures of experts by name. They choose experts, so they are neither quantized nor adapted.

A router in 4 bits sends tokens to other experts, and the QLoRA literature neither quantizes nor adapts it.
"""

from torch import nn


def routers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers and of the weights' owners that route tokens to experts.

    A module routes if it is named after a gate or router and has experts next to it, or if its name begins with
    `router` (doge's `router_gate`, whose experts are rows of embeddings), or if it is inside a module named `router`
    (dbrx's and jetmoe's `router.layer`), or inside a module named `gate` with experts next to it (hunyuan's
    `mlp.gate.wg`).
    """
    modules = dict(model.named_modules())
    return {name for name in modules if name and _routes(name, modules)}


def _routes(name: str, modules: dict[str, nn.Module]) -> bool:
    parent, _, leaf = name.rpartition(".")
    if leaf.startswith("router") or (
        hasattr(modules.get(parent), "experts") and ("gate" in leaf or "router" in leaf)
    ):
        return True
    parts = parent.split(".")
    for depth, part in enumerate(parts):
        beside_experts = hasattr(modules.get(".".join(parts[:depth])), "experts")
        if part == "router" or (part == "gate" and beside_experts):
            return True
    return False
