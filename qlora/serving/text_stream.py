"""Text of an answer while its tokens arrive: whole characters, never a part of a stop sequence."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_CONTEXT = 4
"""tokens of the prompt before a continuation, which decide if its first word begins with a space"""


class TextStream:
    """Converts tokens to pieces of text.

    Args:
        tokenizer: used by this thread alone; tokenizers cannot be shared by threads that encode.
        stop: sequences that end the text; neither they nor what follows is part of it.
        before: prompt that the text continues, with the space between them; empty for an answer, which is returned
            without white space at its ends.

    Examples:
        >>> stream = TextStream(tokenizer, stop=["."])
        >>> "".join(stream.feed(token) for token in tokenizer(" One. Two.").input_ids)
        'One'
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(before[-_CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._trims, self._begun = not before, False
        self._held = ""
        """text that could be the start of a stop sequence, or white space at the end"""
        self.stopped = False
        """True if a stop sequence has ended the text"""

    def feed(self, token: int) -> str:
        """Return the text that is complete with the next token; empty while a character or a sequence is not."""
        self._tokens.append(token)
        text = self._decode(self._start, None)
        if text.endswith("\ufffd"):  # bytes of a character that is not complete
            return ""
        return self._pass(self._new(text))

    def end(self) -> str:
        """Return the rest of the text after the last token."""
        rest = self._pass(self._new(self._decode(self._start, None)))
        if self.stopped:
            return rest
        held, self._held = self._held, ""
        return rest + (self._trimmed(held) if not self._trims else self._trimmed(held).rstrip())

    def _new(self, text: str) -> str:
        """Return what `text`, decoded from the start, has beyond the text that was read already."""
        piece = text[len(self._decode(self._start, self._read)) :]
        if piece:
            # the tokens of this piece are the context of the next, so that spaces between the two come out right
            self._start, self._read = self._read, len(self._tokens)
        return piece

    def _decode(self, start: int, end: int | None) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _pass(self, piece: str) -> str:
        """Return the text that can be shown now that `piece` has come, and hold the rest."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for sequence in self._stop if (place := text.find(sequence)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._trimmed(text[: min(found)].rstrip() if self._trims else text[: min(found)])
        shown = len(text) - self._longest_start(text)
        if self._trims:
            shown = len(text[:shown].rstrip())
        self._held = text[shown:]
        return self._trimmed(text[:shown])

    def _longest_start(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop sequence begins."""
        lengths = range(min(len(text), max(map(len, self._stop), default=1) - 1), 0, -1)
        ends = (size for size in lengths if any(sequence.startswith(text[-size:]) for sequence in self._stop))
        return next(ends, 0)

    def _trimmed(self, text: str) -> str:
        """Drop white space at the start of an answer."""
        if self._trims and not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text
