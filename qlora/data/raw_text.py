"""Renders rows without a chat template."""

from qlora.data.encoding import Document, Encoder, Part
from qlora.formats import Completion


class RawText:
    """Renders a prompt and completion without a template: bos in front if the tokenizer adds one, eos at the end."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def document(self, row: Completion, *, everything: bool = False) -> Document:
        """Render a row with its completion trained; with `everything`, the prompt too."""
        guard, encoder = self._encoder.guard, self._encoder
        both = (Part(guard(row.prompt), everything), Part(guard(row.completion), True, answer=True))
        parts = tuple(part for part in both if part.text)
        # with data.control_tokens: parse, the text can bring its own
        has_bos, has_eos = encoder.starts_with_bos(parts[0].text), encoder.ends_with_eos(parts[-1].text)
        return Document(parts, bos=encoder.adds_bos and not has_bos, eos=not has_eos)

    def prompt(self, text: str) -> Document:
        """Render a text for the model to continue."""
        text = self._encoder.guard(text)
        bos = self._encoder.adds_bos and not self._encoder.starts_with_bos(text)
        return Document((Part(text, False),), bos=bos, eos=False)
