"""One answer in the making: its prompt, how to choose its tokens, and who hears of its text."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qlora.serving.sampling import choose
from qlora.serving.text_stream import TextStream


@dataclass(frozen=True)
class Settings:
    """Choice of tokens, and when to stop."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    """tokens that end the answer"""
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Piece:
    """The next text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: str
    """"stop" at an end token or a stop sequence, "length" after `max_tokens`"""


@dataclass(frozen=True)
class Failed:
    """The end of an answer that could not be completed."""

    error: Exception


Event = Piece | Finished | Failed


class Stopping(Exception):
    """The server ends, and its unfinished answers with it."""


class Job:
    """An answer in the making.

    Args:
        adapter: name of the adapter; None for the base, or for a model without adapters.
        prompt: token ids.
        settings: choice of tokens.
        continues: True if the answer continues the text of the prompt, so that its white space counts.
        tell: called with each event, from the thread of the model.
    """

    def __init__(
        self,
        adapter: str | None,
        prompt: list[int],
        settings: Settings,
        tell: Callable[[Event], object],
        *,
        continues: bool = False,
    ) -> None:
        self.adapter, self.prompt, self.settings = adapter, prompt, settings
        self._tell, self._continues = tell, continues
        self.tokens: list[int] = []
        """tokens of the answer so far, including the one that ends it"""
        self.slot: int | None = None
        self.cached = 0
        """tokens of prompt and answer in the cache"""
        self.done = False
        self.answered = False
        """True if the answer is complete"""
        self.began: float | None = None
        """time at which the model took the job, from `time.monotonic`"""
        self.seconds = 0.0
        """time that the answer took since then, once it has ended"""
        self._left = False

    @property
    def left(self) -> bool:
        """True if the client has left; set by `leave` from any thread."""
        return self._left

    def leave(self) -> None:
        """Give the answer up: its slot is free before the next token."""
        self._left = True

    def begin(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Note that the model has taken the job. tokenizer: belongs to the thread of the model."""
        self.began = time.monotonic()
        self._text = TextStream(tokenizer, self.settings.stop, self.prompt if self._continues else ())
        self._generator = torch.Generator()
        if self.settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.settings.seed)

    def take(self, logits: Tensor) -> int:
        """Choose the next token from logits [V], tell its text, and return it. `done` tells if it was the last.

        Raises:
            ModelError: the logits are not finite.
        """
        settings = self.settings
        token = choose(
            logits,
            [*self.prompt, *self.tokens] if settings.repetition_penalty != 1.0 else (),
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            generator=self._generator,
        )
        self.tokens.append(token)
        if token in settings.ends:
            self._finish("stop")
            return token
        if piece := self._text.feed(token):
            self._tell(Piece(piece))
        if self._text.stopped:
            self._close(Finished("stop"))
        elif len(self.tokens) == settings.max_tokens:
            self._finish("length")
        return token

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self._close(Failed(error))

    def _finish(self, reason: str) -> None:
        if piece := self._text.end():
            self._tell(Piece(piece))
        self._close(Finished("stop" if self._text.stopped else reason))

    def _close(self, event: Event) -> None:
        if not self.done:
            self.done, self.answered = True, isinstance(event, Finished)
            self.seconds = 0.0 if self.began is None else time.monotonic() - self.began
            self._tell(event)
