"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190), a rival of LoRA that exists in this benchmark only.

Every attention also attends to `LENGTH` trained keys and values that precede the text. They start at the keys and
values of real tokens, as in section 7.4 of the paper. The model does therefore not start at the base. The paper's MLP
that computes the prefix during training (section 4.3) is left out: the keys and values themselves are trained, as in
P-Tuning v2 (Liu et al. 2022, arXiv:2110.07602).

The prefix is a filled cache of transformers, so the model itself stays unchanged.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.methods.generation import CACHE, Cache
from qlora.adapter.methods import Method
from qlora.data import IGNORE_INDEX, Batch
from qlora.model.head import decoder_of, head_of
from qlora.objective.causal_lm import CausalLM
from qlora.objective.objective import Loss
from qlora.ops.cross_entropy import linear_cross_entropy
from qlora.recipe import Adapter

LENGTH = 16


class PrefixTuning(Method):
    """Prefix tuning: trains `model.prefix` [layers, 2, key heads, length, head size], keys and then values."""

    name = "prefix_tuning"

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and give it a prefix made of random real tokens; `settings` has no say."""
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(vocabulary, (1, LENGTH), generator=generator)
        model.prefix = nn.Parameter(keys_and_values(model, ids).bfloat16())
        return model


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """Return what the model's cache holds after `ids` [1, T]: [layers, 2, key heads, T, head size]."""
    cache = DynamicCache()
    decoder_of(model)(input_ids=ids, use_cache=True, **{CACHE: cache})
    return torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])


def prefix_cache(model: nn.Module, rows: int) -> Cache:
    """Return a cache that holds the model's prefix for each of `rows` rows; gradients flow into the prefix."""
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    cache = DynamicCache()
    for number, (keys, values) in enumerate(cast(Tensor, model.prefix).to(dtype)):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return cache


@dataclass(frozen=True)
class PrefixLM(CausalLM):
    """Causal language modelling after the prefix."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the summed cross-entropy (nats) of the batch's supervised tokens; its rows are not packed."""
        rows, length = batch.input_ids.shape
        positions = LENGTH + torch.arange(length)
        hidden = decoder_of(model)(
            input_ids=batch.input_ids,
            position_ids=positions.expand(rows, -1),
            use_cache=True,
            **{CACHE: prefix_cache(model, rows)},
        ).last_hidden_state
        head, targets = head_of(model), batch.labels[:, 1:].flatten()
        supervised = int((targets != IGNORE_INDEX).sum())
        return Loss(
            linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head.weight, targets, supervised=supervised)
        )
