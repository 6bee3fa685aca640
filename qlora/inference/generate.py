"""Generation of an answer to one prompt, returned whole and optionally streamed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, StoppingCriteria, TextStreamer

from qlora.errors import ModelError, QloraError, first_line
from qlora.objective.step import evaluation_mode
from qlora.runtime.out_of_memory import is_out_of_memory


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    *,
    stop_ids: Iterable[int] = (),
    temperature: float = 0.0,
    on_text: Callable[[str], object] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> str:
    """Generate the model's continuation of `prompt` and return it as text without special tokens.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        tokenizer: the model's tokenizer.
        prompt: token ids.
        max_new_tokens: maximum length of the answer in tokens.
        stop_ids: tokens that end the answer, in addition to the end tokens of the model and the tokenizer.
        temperature: 0 is greedy and deterministic. Above 0, tokens are sampled with torch's random numbers.
        on_text: called with each new piece of the answer, whole words at a time.
        stopped: called after every token; returns True to end the answer.

    Raises:
        ModelError: the model's own code fails when it generates.

    >>> answer(model, tokenizer, tokenizer("Once upon a time").input_ids, max_new_tokens=32)
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)  # [1, T]
    ends = end_ids(model, tokenizer, stop_ids)
    with evaluation_mode(model), _failure_named(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            eos_token_id=sorted(ends) or None,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            use_cache=True,
            streamer=None if on_text is None else _Streamer(tokenizer, on_text),
            stopping_criteria=None if stopped is None else [_Stop(stopped)],
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@contextmanager
def _failure_named(model: nn.Module) -> Iterator[None]:
    """Turn an error of the model's code into a ModelError: some architectures train, and fail when they generate."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error) or isinstance(error, QloraError):
            raise
        raise ModelError(
            f"{type(model).__name__} fails when it generates ({type(error).__name__}: {first_line(error)}). Training "
            "and evaluation do without that; set training.samples=0"
        ) from error


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerFast, stop_ids: Iterable[int] = ()) -> set[int]:
    """Return the tokens that end an answer: `stop_ids`, and the end tokens of the model and the tokenizer."""
    own: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {*stop_ids, *(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return {int(end) for end in ends if end is not None}


class _Streamer(TextStreamer):
    """Passes the answer on in pieces, without leading and trailing white space."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._space = on_text, ""
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass one piece on; transformers calls this."""
        text = self._space + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._begun = True
            self._on_text(shown)


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)
