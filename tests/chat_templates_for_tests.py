"""Chat templates that people use, conversations, and the rule of training that they must keep."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers_for_tests import with_markers_of
from transformers import PreTrainedTokenizerFast

from qlora.data import IGNORE_INDEX
from qlora.data.encoding import Encoder
from qlora.data.rendering import Renderer
from qlora.data.templates import NAMED, template_text
from qlora.formats import Conversation, Message


def _sources() -> dict[str, str]:
    found = find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    (folder,) = found.submodule_search_locations
    theirs = {
        f"trl/{file.stem}": file.read_text() for file in sorted(Path(folder).glob("chat_templates/*.jinja"))
    }
    assert len(theirs) >= 72
    return {**theirs, **{name: template_text(name) for name in NAMED}}


SOURCES = _sources()
DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %b %Y': '26 Jul 2024'}[format] }}"
    "{%- endmacro %}"
)
WORDS = [
    "the cat",
    "2 + 2 = 4",
    "\n\n",
    "  ",
    "<b>bold</b>",
    "Ünïcödé 猫",
    "{{ x }}",
    "System:",
    "a|b",
    "user",
    "\t",
    "!",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "A word."}},
        },
    },
}


def plain(chance: random.Random, system: bool = False) -> Conversation:
    """Make a conversation of one to four questions and answers."""

    def said(number: int) -> str:
        return f"{number}:" + "".join(chance.choices(WORDS, k=chance.randint(0, 6))) + f":{number}"

    messages: list[Message] = [{"role": "system", "content": said(0)}] if system else []
    for turn in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": said(2 * turn + 1)})
        messages.append({"role": "assistant", "content": said(2 * turn + 2)})
    return Conversation(tuple(messages))


def rich(chance: random.Random) -> Conversation:
    """Make a conversation with reasoning, tool calls, consecutive and trailing messages, and answers without weight."""
    messages: list[Message] = []
    tools = ()
    for index, message in enumerate(plain(chance, system=chance.random() < 0.3).messages):
        if message["role"] == "assistant":
            if chance.random() < 0.4:
                message = {**message, "reasoning_content": f"thought {index} of it"}
            if chance.random() < 0.3:
                call = {
                    "type": "function",
                    "function": {"name": "look_up", "arguments": {"word": f"word {index}"}},
                }
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "name": "look_up", "content": f"found {index}"})
                tools = (TOOL,)
        messages.append(message)
    if chance.random() < 0.2:
        messages.append({"role": "user", "content": "One more?"})
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    context = frozenset(answers[:-1][: chance.randint(0, 1)])
    return Conversation(tuple(messages), tools, context)


def runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of trained tokens."""
    start = None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label == IGNORE_INDEX and start is not None:
            yield start, index
            start = None
        elif label != IGNORE_INDEX and start is None:
            start = index


class Reference:
    """The same conversation as transformers renders it, and the trained tokens as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, encoder: Encoder) -> None:
        self.tokenizer, self.renderer, self.encoder = tokenizer, renderer, encoder

    def rendered(self, conversation: Conversation, count: int, prompt: bool) -> str:
        """Render the first messages; DeepSeek's template takes the arguments of a call as JSON text."""
        try:
            return self._rendered(conversation, count, prompt)
        except TypeError:
            messages = json.loads(json.dumps(conversation.messages))
            for message in messages:
                for call in message.get("tool_calls", ()):
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            return self._rendered(replace(conversation, messages=tuple(messages)), count, prompt)

    def _rendered(self, conversation: Conversation, count: int, prompt: bool) -> str:
        messages: list[Any] = [dict(message) for message in conversation.messages[:count]]
        if self.renderer.template.content_in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages,
            tools=list(conversation.tools) or None,
            chat_template=DATE + self.tokenizer.chat_template,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def check(self, conversation: Conversation) -> Counter[str]:
        """Check the rule for one conversation. Raises BadRow if the template refuses it."""
        tokenizer = self.tokenizer
        document = self.renderer.document(conversation)
        (encoded,) = self.encoder.encode([document])
        ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
        text = tokenizer.decode(ids)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]  # no control token is cut
        assert not encoded.forged
        bos = tokenizer.bos_token if document.bos else ""
        answers = conversation.trained
        prompts = {}
        for index in answers:
            try:
                prompts[index] = bos + self.rendered(conversation, index, prompt=True)
            except Exception:  # noqa: BLE001  the template refuses a conversation that ends here
                assert index != answers[-1]
        unseen = [index for index in answers if index in prompts]
        trained = list(runs(labels))
        for start, end in trained:
            before, through = len(tokenizer.decode(ids[:start])), len(tokenizer.decode(ids[: start + 1]))
            continued = [index for index in unseen if text.startswith(prompts[index])]
            index = next((i for i in continued if before <= len(prompts[i]) < through), None)
            if index is None:  # the template's generation block begins behind the prompt
                assert document.tallies["answers trained in part"]
                index = max(i for i in continued if len(prompts[i]) < before)
            unseen = unseen[unseen.index(index) + 1 :]
            answer = text[len(prompts[index]) : len(tokenizer.decode(ids[:end]))]
            self.complete(conversation.messages[index], answer, document.tallies)
        assert end == len(ids)
        assert index == answers[-1]
        assert ids[-1] in {tokenizer.eos_token_id, *self.stops}
        untrained = ("untrained answers", "unwritten answers", "opening answers")
        assert len(trained) + sum(document.tallies[name] for name in untrained) == len(answers)
        self.nothing_is_lost(conversation, text, document.tallies)
        return document.tallies

    def complete(self, message: Message, answer: str, tallies: Counter[str]) -> None:
        assert message["content"].strip() in answer
        if message.get("reasoning_content", "") not in answer:
            assert tallies["unwritten: reasoning"]
        for call in message.get("tool_calls", ()):
            assert call["function"]["name"] in answer

    @property
    def stops(self) -> set[int]:
        vocabulary = self.tokenizer.get_vocab()
        return {
            vocabulary[text] for text in ("<|eom_id|>", "<|call|>", "<|observation|>") if text in vocabulary
        } | {
            self.encoder.control_id(control[1])
            for text in (self.renderer.closing.last, self.renderer.closing.between)
            if (control := self.encoder.control_at_end(text))
        }

    def nothing_is_lost(self, conversation: Conversation, text: str, tallies: Counter[str]) -> None:
        end = conversation.trained[-1] + 1
        assert tallies["messages after the last answer"] == len(conversation.messages) - end
        names = {"system": "system message", "user": "question", "assistant": "answer", "tool": "tool result"}
        for message in conversation.messages[:end]:
            assert message["content"].strip() in text or tallies[f"unwritten: {names[message['role']]}"]
            assert message.get("reasoning_content", "") in text or tallies["unwritten: reasoning"]
            for call in message.get("tool_calls", ()):
                assert call["function"]["arguments"]["word"] in text or tallies["unwritten: tool call"]


def reference(name: str) -> Reference:
    tokenizer = with_markers_of(SOURCES[name])
    encoder = Encoder(tokenizer, SOURCES[name])
    return Reference(tokenizer, Renderer(tokenizer, encoder, None), encoder)
