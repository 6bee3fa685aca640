"""Renders conversations with a chat template and marks the characters to train on.

The trained part of an answer is exactly the text that the model must generate: it starts where the prompt of
generation ends (the messages before it, rendered with the generation prompt) and ends with the text that closes the
turn. Positions come from rendering prefixes of the conversation, not from searching for token ids. Whatever a
template drops, or writes so that an answer does not continue its prompt, is counted in `Document.tallies`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from qlora.data.chat_template import ChatTemplate, Span
from qlora.data.encoding import MARKER, Document, Encoder, Part
from qlora.data.remarks import (
    AFTER_LAST_ANSWER,
    OPEN_THOUGHTS,
    OPENING_ANSWERS,
    PLACED,
    TRIMMED,
    UNKNOWN_MARKERS,
    UNTRAINED_ANSWERS,
    UNTRAINED_BY_BLOCKS,
    UNTRAINED_ENDS,
    UNWRITTEN,
    UNWRITTEN_ANSWERS,
)
from qlora.data.templates import NAMED
from qlora.errors import DataError
from qlora.formats import BadRow, Conversation, Message

_PROBE = "qlora's probe"

_LIST = re.compile(r"['\"]type['\"]: ?['\"]text")  # content in parts, written by a template that expects text
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_EMPTY_THOUGHT = re.compile(r"^\s*<think>\s*</think>\s*")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Closing:
    """Text with which a template ends an answer."""

    tail: str
    """text after the last answer of a conversation"""
    last: str
    """part of `tail` that ends the answer: through the last control token, or without trailing white space"""
    between: str
    """text that ends an answer before another question; empty if only the next question ends it"""
    ends_by_control: bool
    """True if `last` ends with a control token; otherwise eos is appended"""


class _Found(NamedTuple):
    """An answer in a document."""

    span: Span
    has_end: bool


class Renderer:
    """Renders conversations with one template.

    Args:
        tokenizer: supplies bos_token and eos_token, and its own template if `template` is None.
        encoder: encoder of the same tokenizer and template.
        template: jinja source; None uses the tokenizer's own template. The tokenizer's own template must write
            bos itself if it needs one (transformers' convention). With another template, bos is put in front of
            a text without bos if the tokenizer does so with plain text.
        options: variables for the template, such as `enable_thinking`.

    Raises:
        DataError: There is no template, or it cannot render a question and an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        encoder: Encoder,
        template: str | None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template: set data.template to one of "
                f"{', '.join(NAMED)} or to a .jinja file"
            )
        self.template = ChatTemplate(tokenizer, template, options or {})
        self._encoder = encoder
        self._adds_bos = template is not None and encoder.adds_bos
        self.closing = self._find_closing()
        self._thinks = self._finds_thoughts()
        self.unknown_markers = self._find_unknown_markers()
        """markers such as <|im_start|> that the template writes and the tokenizer does not have"""

    def document(self, conversation: Conversation, *, everything: bool = False) -> Document:
        """Render the conversation up to the end of its last trained answer, with the answers marked as trained.

        An answer before the last one is not trained if the document does not contain it as generation would write it:
        after its own prompt, and complete. (Mistral's template, for example, moves the system message to the last
        question, and Qwen 3's removes the thoughts of earlier answers.) The tallies count such answers. The last
        answer always follows its prompt.

        Args:
            conversation: messages with at least one trained answer.
            everything: train all of the text, not only the answers.

        Raises:
            BadRow: The template refuses the conversation, or does not write the last answer.
        """
        tools = self._guarded(conversation.tools)
        messages = [self._prepared(message) for message in conversation.messages]
        answers = conversation.trained
        last = answers[-1]
        following = len(messages) - last - 1
        messages = messages[: last + 1]
        text, start, blocks, placed = self._last_answer(messages, tools)
        closed = self.closing.ends_by_control and self._encoder.control_at_end(text) is not None
        tallies = Counter({AFTER_LAST_ANSWER: following, PLACED: int(placed)})
        spans = {last: (start, len(text))}
        for index in answers[:-1]:
            found = self._earlier_answer(text, messages[: index + 1], tools)
            if isinstance(found, str):
                tallies[found] += 1
            else:
                spans[index] = found.span
                tallies[UNTRAINED_ENDS] += not found.has_end
        trained = sorted(spans.values())
        if blocks is not None:
            overlaps = [_intersection([span], blocks) for span in trained]
            tallies[UNTRAINED_BY_BLOCKS] += sum(
                not found or found[0][0] > start or found[-1][1] < end
                for found, (start, end) in zip(overlaps, trained, strict=True)
            )
            trained = [span for found in overlaps for span in found]
        if self._thinks and not messages[last].get("reasoning_content"):
            tallies[OPEN_THOUGHTS] += (
                bool(_OPEN_THOUGHT.search(text[:start])) and "</think>" not in text[start:]
            )
        for name in dict.fromkeys(self._unwritten(text, messages, tools)):
            tallies[f"{UNWRITTEN}: {name}"] += 1
        contents = [message["content"] for message in messages if "instruction" not in message]
        tallies[TRIMMED] += any(content not in text and content.strip() in text for content in contents)
        for marker in self.unknown_markers:
            tallies[f"{UNKNOWN_MARKERS}: {marker}"] += 1
        context = self._context(text, conversation.context, messages, tools) if everything else []
        return Document(
            tuple(_parts(text, trained, everything, context)),
            bos=self._needs_bos(text),
            eos=not closed,
            tallies=+tallies,
        )

    def _context(self, text: str, context: Iterable[int], messages: list[Message], tools: Any) -> list[Span]:
        """Return the spans of answers that must not be trained even if all other text is."""
        spans = []
        for index in sorted(context):
            if index >= len(messages):
                continue
            found = self._earlier_answer(text, messages[: index + 1], tools)
            if isinstance(found, str):
                raise BadRow(
                    "weight 0 with train_on: all",
                    f"message {index + 1} cannot be kept out of the training; set data.train_on=completion",
                )
            spans.append(found.span)
        return spans

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Document:
        """Render the generation prompt for an answer to these messages. Raises BadRow if the template refuses them."""
        prepared = [self._prepared(message) for message in messages]
        text = self.template.render(prepared, self._guarded(tools), generation=True)[0]
        return Document((Part(text, False),), bos=self._needs_bos(text), eos=False)

    def _last_answer(self, messages: list[Message], tools: Any) -> tuple[str, int, list[Span] | None, bool]:
        """Return the document's text, the start of its last answer, the template's generation blocks in it, and True
        if the answer was put behind its prompt.

        The text ends with the closing of the answer. If the template writes the answer elsewhere than after its
        prompt (DeepSeek R1's prompt opens a thought that its conversations omit), the answer is put behind the prompt.
        """
        if len(messages) == 1:
            raise BadRow("no question", "the only trained answer is the first message")
        answer = messages[-1]
        prompt, _ = self.template.render(messages[:-1], tools, generation=True)
        alone, blocks = self.template.render(messages, tools)
        placed = not (alone.startswith(prompt) and _is_in(answer["content"], alone[len(prompt) :]))
        if not placed:
            body, closing = self._split(alone[len(prompt) :])
            text = prompt + body + closing
        elif answer.get("tool_calls"):
            raise BadRow(
                "refused by the chat template",
                f"message {len(messages)}: its generation prompt does not continue to a tool call",
            )
        else:
            content, thoughts = answer["content"], answer.get("reasoning_content")
            if thoughts and _OPEN_THOUGHT.search(prompt):
                content = f"{thoughts}\n</think>\n\n{content}"
            text, blocks = prompt + content + self.closing.last, None
        for call in answer.get("tool_calls", ()):
            if not _is_in(_name(call), text[len(prompt) :]):
                raise BadRow(
                    "not written by the chat template",
                    f"message {len(messages)}: the call of {_name(call)!r}",
                )
        return text, len(prompt), blocks, placed

    def _earlier_answer(self, text: str, messages: list[Message], tools: Any) -> "_Found | str":
        """Find the last of `messages` in the document; return the tally to count if it is not there as generated."""
        answer = messages[-1]
        if len(messages) == 1:
            return OPENING_ANSWERS
        try:
            prompt, _ = self.template.render(messages[:-1], tools, generation=True)
            alone, _ = self.template.render(messages, tools)
        except BadRow:  # the template refuses a conversation that ends here
            return UNTRAINED_ANSWERS
        start = len(prompt)
        if not (text.startswith(prompt) and alone.startswith(prompt)):
            return UNTRAINED_ANSWERS
        body, closing = self._split(alone[start:])
        pieces = [answer["content"], *map(_name, answer.get("tool_calls", ()))]
        if not all(_is_in(piece, body) for piece in pieces):
            return UNWRITTEN_ANSWERS
        # Qwen 3 writes an empty thought before the last answer only
        for written in filter(None, (body, _EMPTY_THOUGHT.sub("", body))):
            end = start + len(written)
            if not text.startswith(written, start):
                continue
            for ending in (self.closing.between, closing):
                if ending and text.startswith(ending, end):
                    return _Found((start, end + len(ending)), True)
            return _Found((start, end), False)
        return UNTRAINED_ANSWERS

    def _split(self, answer: str) -> tuple[str, str]:
        """Split an answer at the end of a rendered conversation into its text and what closes it."""
        closing = self.closing
        if closing.tail and answer.endswith(closing.tail):
            return answer[: -len(closing.tail)], closing.last
        # another end than after plain text, such as <|eom_id|> after a tool call
        control = self._encoder.control_at_end(answer.rstrip())
        return (answer[: control[0]], control[1]) if control else (answer.rstrip(), "")

    def _find_closing(self) -> Closing:
        """Render two short conversations to learn which text the template writes after an answer."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        try:
            tail = self._after_probe([question, answer])
        except BadRow as error:
            try:
                self.template.content_in_parts = True
                tail = self._after_probe([question, answer])
            except (BadRow, DataError):
                raise DataError(
                    f"data.template cannot render a question and its answer: {error}. Correct it"
                ) from None
        try:
            # Cut before the next question: the text after it does not belong to the answer.
            two = [question, answer, question, {**answer, "content": "!"}]
            between = self._after_probe(two).partition("?")[0]
        except BadRow:
            between = tail  # the template allows one question only
        end = self._encoder.last_control_end(tail)
        last = tail[:end] if end else tail.rstrip()
        shared = self._encoder.uncut(tail, _common_start(tail, between))
        shared_end = self._encoder.last_control_end(shared)
        if shared_end:
            text = shared[:shared_end]
        elif shared == tail:
            text = last
        else:
            text = re.sub(r"\s+\S*$", "", shared)  # drop a word whose first letters match by chance
        return Closing(tail, last, text, end is not None)

    def _after_probe(self, messages: Sequence[Message]) -> str:
        rendered, _ = self.template.render(list(messages), [])
        if self.template.content_in_parts and _LIST.search(rendered):
            raise BadRow("refused by the chat template", "it writes the content as a list")
        _, probe, tail = rendered.rpartition(_PROBE)
        if not probe and not self.template.content_in_parts:
            with suppress(BadRow, DataError):
                self.template.content_in_parts = True
                return self._after_probe(messages)
            self.template.content_in_parts = False
        if not probe:
            raise DataError(
                f"data.template does not render the answer; its output is {rendered!r}. "
                "Add the content of assistant messages to it"
            )
        return tail

    def _finds_thoughts(self) -> bool:
        """Return True if the template knows thoughts, as a field of the message or in a generation prompt."""
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "!", "reasoning_content": _PROBE}
        try:
            written = _PROBE in self.template.render([question, answer], [])[0]
            return written or bool(
                _OPEN_THOUGHT.search(self.template.render([question], [], generation=True)[0])
            )
        except BadRow:
            return False

    @property
    def missing_markers(self) -> list[str]:
        """`unknown_markers`, and the unknown markers around a system message, which not every row has."""
        with suppress(BadRow):  # a template can refuse system messages
            return self._find_unknown_markers({"role": "system", "content": "?"})
        return self.unknown_markers

    def _find_unknown_markers(self, *before: Message) -> list[str]:
        asked = [*before, {"role": "user", "content": "?"}]
        answered = [*asked, {"role": "assistant", "content": "!"}]
        text = self.template.render(answered, [])[0] + self.template.render(asked, [], generation=True)[0]
        return [marker for marker in dict.fromkeys(MARKER.findall(text)) if not self._encoder.knows(marker)]

    def _unwritten(self, text: str, messages: Sequence[Message], tools: Any) -> Iterator[str]:
        """Yield the name of each piece of the messages that the text does not contain."""
        # a function is named in the list of tools and in each call
        calls = Counter(_name(call) for message in messages for call in message.get("tool_calls", ()))
        listed = Counter(map(_name, tools))
        if any(text.count(name) < count + listed[name] for name, count in calls.items()):
            yield "tool call"
        for message in messages:
            name = {"system": "system message", "user": "question", "tool": "tool result"}.get(
                message["role"], "answer"
            )
            contents = [message.get("instruction", message["content"]), message.get("input", "")]
            if not all(_is_in(content, text) for content in contents):
                yield name
            if not _is_in(message.get("reasoning_content", ""), text):
                yield "reasoning"
            for key in ("name", "tool_call_id"):
                if not _is_in(message.get(key, ""), text):
                    yield key
        if any(text.count(_name(tool)) < 1 for tool in tools):
            yield "tools"

    def _needs_bos(self, text: str) -> bool:
        return self._adds_bos and not self._encoder.starts_with_bos(text)

    def _prepared(self, message: Message) -> Message:
        """Split the thoughts off an answer if the template knows them; hide spelled control tokens."""
        content = message["content"]
        if self._thinks and message["role"] == "assistant" and not message.get("reasoning_content"):
            thought = _THOUGHT.fullmatch(content)
            if thought:
                message = {**message, "reasoning_content": thought[1].strip("\n"), "content": thought[2]}
        return {key: value if key == "role" else self._guarded(value) for key, value in message.items()}

    def _guarded(self, value: Any) -> Any:
        """Hide control tokens in all text of a message or a tool."""
        if isinstance(value, str):
            return self._encoder.guard(value)
        if isinstance(value, Mapping):
            return {self._encoder.guard(key): self._guarded(inner) for key, inner in value.items()}
        return [self._guarded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_in(piece: str, text: str) -> bool:
    """Return True if the text contains a piece; templates trim the white space around pieces."""
    return piece in text or piece.strip() in text


def _name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool or of a tool call."""
    return str(tool["function"]["name"])


def _parts(
    text: str, trained: Sequence[Span], everything: bool, context: Sequence[Span] = ()
) -> Iterator[Part]:
    """Yield the parts of a text: answers are trained, `context` is not, and the rest is if `everything` is."""
    end = 0
    marked = [(start, stop, True) for start, stop in trained] + [(*span, False) for span in context]
    for start, stop, is_trained in sorted(marked):
        if end < start:
            yield Part(text[end:start], everything)
        yield Part(text[start:stop], is_trained, answer=True)
        end = stop
    if end < len(text):
        yield Part(text[end:], everything)


def _intersection(spans: Sequence[Span], blocks: Sequence[Span]) -> list[Span]:
    """Return the overlaps of two lists of spans, in order."""
    overlaps = ((max(a, c), min(b, d)) for a, b in spans for c, d in blocks)
    return sorted((start, end) for start, end in overlaps if start < end)


def _common_start(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
