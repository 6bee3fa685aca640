"""Forward passes of several requests at once, over a key-value cache with a slot for each of them.

A token at position p of a request is at place p of its slot, whatever the other slots hold. So there is no padding
before a prompt, positions are exact, and requests of any lengths join and leave between two passes. A pass of several
prompts pads the shorter ones at their ends: no query attends to a later place, and the next tokens overwrite it.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from qlora.errors import first_line
from qlora.runtime.out_of_memory import is_out_of_memory
from qlora.serving.kv_layout import CannotBatch, KVLayout, LayerShape

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""largest difference between a batch and a request alone in the check at the start, relative to the logits' norm"""


class _Place:
    """The slots and positions of one forward pass, shared by all layers."""

    def __init__(self, slots: Sequence[int], positions: Tensor, length: int) -> None:
        consecutive = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        index = torch.tensor(slots, device=positions.device)
        self.rows = slice(slots[0], slots[0] + len(slots)) if consecutive else index
        self.row_of, self.positions, self.length = index[:, None], positions, length


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, context, width]."""

    is_sliding = False

    def __init__(self, shape: LayerShape, slots: int, context: int, device: torch.device) -> None:
        super().__init__()
        size = (slots, shape.heads, context)
        # zeros, not empty: a masked place that is not a number would still spoil the weighted sum
        self.keys = torch.zeros(*size, shape.key_width, dtype=shape.dtype, device=device)
        self.values = torch.zeros(*size, shape.value_width, dtype=shape.dtype, device=device)
        self.is_initialized = True
        self.place: _Place | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors exist from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, heads, T, width] at this pass's place; return all of its slots' so far."""
        place = self.place
        assert place is not None
        both = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[place.row_of, :, place.positions] = new.transpose(1, 2)
            both.append(stored[:, :, : place.length][place.rows])
        return both[0], both[1]

    def get_seq_length(self) -> int:
        """Return the places in use before this pass; models are given positions and masks, and need not ask."""
        return 0 if self.place is None else self.place.length - self.place.positions.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys of this pass."""
        return (query_length if self.place is None else self.place.length), 0

    def get_max_length(self) -> int:
        """Return the places of a slot."""
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


class SlotModel:
    """A causal language model with a key-value cache of fixed size.

    Args:
        model: the model, in evaluation mode; an adapter can be switched between two passes.
        layout: its cache, from `read_layout`.
        slots: number of requests in the cache.
        context: tokens of a slot.
    """

    def __init__(self, model: nn.Module, layout: KVLayout, slots: int, context: int) -> None:
        self.model, self.layout, self.slots, self.context = model, layout, slots, context
        self.device = next(model.parameters()).device
        self._layers = [_SlotLayer(shape, slots, context, self.device) for shape in layout.layers]
        self._cache = Cache(layers=list(self._layers))
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    @torch.no_grad()
    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Compute the next tokens of several requests; return the logits after the last one of each, [B, V] in fp32.

        Args:
            slots: the slot of each request, ascending.
            tokens: the next tokens of each request.
            starts: the position of the first of them, which is the number of tokens of the request so far.
        """
        longest = max(map(len, tokens))
        rows = [[*row, *[row[-1]] * (longest - len(row))] for row in tokens]
        ids = torch.tensor(rows, device=self.device)  # [B, T]
        steps = torch.arange(longest, device=self.device)
        # the padding of a prompt that ends near the end of its slot shares the last place, which is not in use yet
        positions = (torch.tensor(starts, device=self.device)[:, None] + steps).clamp(max=self.context - 1)
        length = min(max(starts) + longest, self.context)
        last = torch.tensor([len(row) - 1 for row in tokens], device=self.device)
        kept, column = torch.unique(last, return_inverse=True)
        extra: dict[str, Any] = {"logits_to_keep": kept} if self._keeps else {}
        with self._at(_Place(slots, positions, length)):
            output = self.model(
                input_ids=ids,
                attention_mask=self.layout.masks(positions, length),
                position_ids=positions,
                use_cache=True,
                **{self.layout.cache_keyword: self._cache},
                **extra,
            )
        logits: Tensor = output.logits
        return logits[torch.arange(len(slots)), column if self._keeps else last].float()

    @contextmanager
    def _at(self, place: _Place) -> Iterator[None]:
        for layer in self._layers:
            layer.place = place
        try:
            yield
        finally:
            for layer in self._layers:
                layer.place = None

    def check(self) -> None:
        """Compare a batch of two requests of different lengths with each alone, in transformers' own cache.

        Raises:
            CannotBatch: the logits differ by more than rounding, or the model fails on a batch.
        """
        vocabulary = int(self.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        generator = torch.Generator().manual_seed(0)
        lengths = (5, min(21, self.context - 2))
        prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
        ahead = [(0, prompts[0]), (self.slots - 1, prompts[1])]
        try:
            if self.slots == 1:
                together = torch.cat([self._in_slots([each]) for each in ahead])
            else:
                together = self._in_slots(ahead)
            alone = torch.stack([self._alone(prompt) for prompt in prompts])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CannotBatch(f"it fails on a batch ({type(error).__name__}: {first_line(error)})") from error
        difference = (together - alone).norm(dim=-1) / (alone - alone.mean(-1, keepdim=True)).norm(dim=-1)
        most = difference.nan_to_num(nan=float("inf")).max().item()
        if most > TOLERANCE[self.layout.layers[0].dtype]:
            raise CannotBatch(f"its logits in a batch differ from those of a request alone by {most:.1%}")

    def _in_slots(self, ahead: Sequence[tuple[int, list[int]]]) -> Tensor:
        """Return the logits after each prompt, [B, V], from two passes: over all but its last token, then over that."""
        slots = [slot for slot, _ in ahead]
        self.forward(slots, [prompt[:-1] for _, prompt in ahead], [0] * len(ahead))
        return self.forward(
            slots, [prompt[-1:] for _, prompt in ahead], [len(prompt) - 1 for _, prompt in ahead]
        )

    @torch.no_grad()
    def _alone(self, prompt: list[int]) -> Tensor:
        """Return the logits after `prompt` [V], in two passes with transformers' own cache."""
        cache: Any = DynamicCache(config=self.model.config)
        ids = torch.tensor([prompt], device=self.device)
        for part in (ids[:, :-1], ids[:, -1:]):
            output = self.model(input_ids=part, use_cache=True, **{self.layout.cache_keyword: cache})
        logits: Tensor = output.logits
        return logits[0, -1].float()
