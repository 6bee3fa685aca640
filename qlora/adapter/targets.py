"""Choice of the layers that get an adapter. Training, storage and forecasts all call `select`."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeGuard

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.errors import ModelError, UsageError, listed
from qlora.quantization.expert_stack import expert_stacks
from qlora.quantization.nf4 import is_nf4
from qlora.quantization.read_weights import read_layers
from qlora.quantization.routers import routers

# Names of attention projections in the known architectures. The names of the second set also occur outside
# attention (BERT's `output.dense`, T5's `wo`), so they count only inside a module named after attention.
# fmt: off
ATTENTION = frozenset([
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "Wqkv", "wqkv",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "c_attn", "q_attn", "to_q", "to_k", "to_v",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
])
INSIDE_ATTENTION = frozenset([
    "out_proj", "dense", "proj", "c_proj", "to_out", "wq", "wk", "wv", "wo", "q", "k", "v", "o",
    "query", "key", "value", "qkv",
])
# fmt: on

WORDS = ("attention", "experts", "all-linear")
"""targets that are a word, not a list"""

SAME_PRODUCT = frozenset(["FalconLinear"])
"""Subclasses of `nn.Linear` with their own forward that still computes the plain product."""

HEADS = frozenset(["lm_head", "embed_out"])
"""Names of output heads in models without `get_output_embeddings`."""


def select(
    model: nn.Module, targets: str | Sequence[str], can_adapt: Callable[[nn.Module], bool] | None = None
) -> list[str]:
    """Return the names of the layers that `targets` selects, in the order of the model.

    Linear layers are `nn.Linear`, `Linear4bit` and GPT-2's `Conv1D`.

    Args:
        model: any module with layers to adapt.
        targets: "attention" for the query, key, value and output projections; "experts" for the projections of a
            mixture's experts; "all-linear" for every linear layer and the experts, except the output head, the routers
            of a mixture, and layers whose weight the model reads (see `read_layers`); or a list. Each entry of a list
            is a layer's name, the last parts of a name (`mlp.up_proj`), or a regular expression that matches a whole
            name. Any other string is a list of one entry.
        can_adapt: function that returns True for the layers that a list can name; None means linear layers. The words
            mean linear layers, and experts if it returns True for them.

    Raises:
        UsageError: nothing matches, or an entry of the list matches nothing. The message lists the layers.
        ModelError: an entry of the list matches only layers whose weight the model reads.

    Examples:
        >>> select(model, ["q_proj", "mlp.up_proj"])
    """
    names = layer_names(model, can_adapt or is_linear)
    linears = names if can_adapt is None else linear_names(model)
    experts = [name for name in names if name in expert_stacks(model)]
    if isinstance(targets, str) and targets not in WORDS:
        targets = [targets]
    read = read_layers(model)
    if targets == "attention":
        chosen = {name for name in linears if _is_attention(name)} - read
    elif targets == "experts":
        chosen = set(experts)
    elif targets == "all-linear":
        chosen = {*linears, *experts} - heads(model) - routers(model) - read
    else:
        if not targets:
            raise UsageError("targets: the list is empty; name a layer, or write all-linear")
        chosen = set()
        for entry in targets:
            matches = _match(model, names, entry)
            if not matches - read:
                raise ModelError(
                    f'targets: "{entry}": the code of {type(model).__name__} reads the weights of '
                    f"{listed(sorted(matches))} without calling the layer, so an adapter would have no effect. Leave "
                    "this entry out"
                )
            chosen |= matches - read
    if not chosen:
        kind = type(model).__name__
        raise UsageError(f'targets: "{targets}" matches no layer of {kind}. {list_layers(model, names)}')
    return [name for name in names if name in chosen]


def left_out(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the layers that `targets` match but `select` leaves out, because the model's code reads their weights.

    A list can match such linear layers (see `read_layers`), and routers with code of their own.
    """
    read = read_layers(model)
    if targets == "attention":
        return sorted(filter(_is_attention, read))
    if targets == "all-linear":
        return sorted(read - heads(model) - routers(model))
    entries = [targets] if isinstance(targets, str) else targets
    own = read | set(_own_routers(model))
    return sorted(name for name in own if any(_fits(name, entry) for entry in entries))


def _own_routers(model: nn.Module) -> list[str]:
    """Return the names of the routers that compute with a weight of their own, and so cannot get an adapter."""
    found = {name: model.get_submodule(name) for name in sorted(routers(model))}
    return [
        name
        for name, module in found.items()
        if module._parameters and not (is_linear(module) or isinstance(module, AdaptedLayer))
    ]


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linears that can be adapted: those that are called and compute the plain product."""
    return layer_names(model, is_linear)


def layer_names(model: nn.Module, can_adapt: Callable[[nn.Module], bool]) -> list[str]:
    """Return the names of all layers that can be adapted: those that are called and for which `can_adapt` is True."""
    bypassed = {  # torch's attention reads this weight and never calls the layer
        module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    return [
        name
        for name, module in model.named_modules()
        if name and can_adapt(module) and module not in bypassed
    ]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True if `module` is known to compute x W^T + bias and nothing else."""
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or kind.__name__ in SAME_PRODUCT
    return (isinstance(module, nn.Linear) and plain) or is_nf4(module) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return True if `module` is transformers' Conv1D (GPT-2's linear), which stores its weight as [in, out]."""
    # Compared by name, so that plain torch networks work without importing transformers
    return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    return (linear.nx, linear.nf) if is_conv1d(linear) else (linear.in_features, linear.out_features)  # type: ignore[return-value]


def _is_attention(name: str) -> bool:
    *parents, leaf = name.split(".")
    if leaf.isdigit() and parents:  # diffusers: `attn.to_out.0`
        leaf = parents.pop()
    inside = any("attn" in parent or "attention" in parent for parent in map(str.lower, parents))
    return leaf in ATTENTION or (inside and leaf in INSIDE_ATTENTION)


def heads(model: nn.Module) -> set[str]:
    """Return the names of the output heads."""
    modules = dict(model.named_modules())
    found = {m.get_output_embeddings() for m in modules.values() if hasattr(m, "get_output_embeddings")}
    return {name for name, module in modules.items() if module in found or name.rpartition(".")[2] in HEADS}


def _match(model: nn.Module, names: Sequence[str], entry: str) -> set[str]:
    """Return the layers that one entry of a list matches."""
    try:
        re.compile(entry)
    except re.error as error:
        raise UsageError(f'targets: "{entry}" is not a valid regular expression ({error})') from error
    matches = {name for name in names if _fits(name, entry)}
    if not matches:
        _refuse_routers(model, [name for name in _own_routers(model) if _fits(name, entry)], entry)
        others = Counter(type(m).__name__ for name, m in model.named_modules() if name and _fits(name, entry))
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.items())
        why = f"matches {kinds}, but no layer that the method adapts" if others else "matches nothing"
        raise UsageError(f'targets: "{entry}" {why} in {type(model).__name__}. {list_layers(model, names)}')
    return matches


def _refuse_routers(model: nn.Module, own: list[str], entry: str) -> None:
    """Raise UsageError if an entry names routers with weights of their own."""
    if own:
        kind = type(model.get_submodule(own[0])).__name__
        raise UsageError(
            f'targets: "{entry}": the code of {kind} reads its own weight, so {listed(own)} cannot get an adapter. '
            f"Leave this entry out; train_modules=[{entry}] trains these routers as a whole"
        )


def _fits(name: str, entry: str) -> bool:
    """Return True if an entry of a list is the layer's name, the last parts of it, or an expression for all of it."""
    return name == entry or name.endswith("." + entry) or re.fullmatch(entry, name) is not None


def list_layers(model: nn.Module, names: Sequence[str]) -> str:
    """Return sentences that list these layers of `model`: the linear layers, then the others."""
    linears = [name for name in names if is_linear(model.get_submodule(name))]
    others = [name for name in names if name not in set(linears)]
    return list_linears(linears) + (f" Its other layers: {_counts(others)}." if others else "")


def list_linears(linears: Sequence[str]) -> str:
    """Return a sentence that lists the linear layers by the last part of their names, with counts."""
    return f"Its linear layers: {_counts(linears)}." if linears else "It has no linear layers."


def _counts(names: Sequence[str]) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
