"""The rule of training, over the chat templates that people use: every file that TRL ships, and our own.

A trained answer follows the prompt of generation exactly and ends with what closes it. Whatever of a conversation is
not trained or not written is counted.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers_for_tests import byte_level, with_markers_of
from transformers import PreTrainedTokenizerFast

from qlora.data import IGNORE_INDEX
from qlora.data.encoding import Encoder
from qlora.data.layout import Layout
from qlora.data.rendering import Renderer
from qlora.data.templates import NAMED, template_text
from qlora.errors import DataError
from qlora.formats import BadRow, Conversation, Message
from qlora.recipe import Recipe


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


def check_all(name: str, conversations: int) -> None:
    subject = reference(name)
    chance = random.Random(name)
    for _ in range(conversations):
        subject.check(plain(chance))  # no template refuses questions and answers
    refusals: Counter[str] = Counter()
    for _ in range(conversations):
        try:
            subject.check(rich(chance))
        except BadRow as reason:
            refusals[reason.kind] += 1
    assert set(refusals) <= {"refused by the chat template", "not written by the chat template"}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_trained_is_what_generation_must_write(name: str) -> None:
    check_all(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_what_is_trained_is_what_generation_must_write_in_200_conversations(name: str) -> None:
    check_all(name, 100)


def test_templates_that_refuse_a_system_message_are_few() -> None:
    refusing = []
    for name in SOURCES:
        try:
            reference(name).check(plain(random.Random(0), system=True))
        except BadRow:
            refusing.append(name)
    assert refusing == ["trl/gemma", "trl/gemma_training"]


def trained(document_of: Reference, conversation: Conversation) -> list[str]:
    (encoded,) = document_of.encoder.encode([document_of.renderer.document(conversation)])
    return [
        document_of.tokenizer.decode(encoded.input_ids[start:end])
        for start, end in runs(encoded.labels.tolist())
    ]


def talk(*contents: str, **more: Any) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation((*messages[:-1], {**messages[-1], **more}))


TWO = talk("q1", "b1", "q2", "b2")
SUM = talk("2+2?", "4")
PLACED = {"answers within a thought": 1, "placed answers": 1}
THOUGHT = talk("2+2?", "<think>a</think>b")


@pytest.mark.parametrize(
    ("name", "conversation", "expected", "tallies"),
    [
        # an answer of a conversation is trained through its end, or counted
        ("trl/qwen3_6", TWO, ["\n</think>\n\nb2<|im_end|>"], {"untrained answers": 1}),
        ("trl/qwen3_5_nothink", TWO, ["b2<|im_end|>"], {"untrained answers": 1}),
        ("trl/qwen3", TWO, ["b1<|im_end|>", "<think>\n\n</think>\n\nb2<|im_end|>"], {}),
        ("trl/nemotron_3_nano", TWO, ["b2<|im_end|>"], {"untrained answers": 1, **PLACED}),
        # a trained answer follows the prompt of generation
        ("trl/deepseek_r1_distill", SUM, ["4<｜end▁of▁sentence｜>"], PLACED),
        ("trl/deepseek_r1_distill", THOUGHT, ["a\n</think>\n\nb<｜end▁of▁sentence｜>"], {"placed answers": 1}),
        ("trl/nemotron_3_nano", SUM, ["4<|im_end|>"], PLACED),
        ("trl/qwen3_8", THOUGHT, ["a\n</think>\n\nb<|im_end|>"], {}),
        ("trl/qwen3", THOUGHT, ["<think>\na\n</think>\n\nb<|im_end|>"], {}),
        # no control token is cut
        (
            "trl/gptoss", TWO,
            ["<|channel|>final<|message|>b1", "<|channel|>final<|message|>b2<|return|>"], {"untrained ends": 1},
        ),
        ("trl/glm4moe", TWO, ["\n<think></think>\nb1", "\n<think></think>\nb2</s>"], {"untrained ends": 1}),
        # tokens that are not special end answers too
        ("trl/gemma3", TWO, ["b1<end_of_turn>", "b2<end_of_turn>"], {}),
        # text that a template drops is counted
        ("trl/llama3", talk("q", "b", reasoning_content="thoughts"), ["b<|eot_id|>"], {"unwritten: reasoning": 1}),
    ],
)  # fmt: skip
def test_trained_text_of_known_templates(
    name: str, conversation: Conversation, expected: list[str], tallies: dict[str, int]
) -> None:
    subject = reference(name)
    assert trained(subject, conversation) == expected
    assert subject.renderer.document(conversation).tallies == tallies


def test_one_example_an_answer_trains_every_answer() -> None:
    tokenizer = with_markers_of(SOURCES["trl/qwen3_6"])
    recipe = Recipe.from_dict(
        {"base": {"model": "m"}, "data": {"source": "s", "format": "messages", "examples": "answer"}}
    )
    layout = Layout(recipe.data, tokenizer)
    documents = layout.documents(TWO)
    encoded = layout.encoder.encode(documents)
    ends = [tokenizer.decode(one.input_ids[one.labels != IGNORE_INDEX]) for one in encoded]
    assert ends == ["\n</think>\n\nb1<|im_end|>", "\n</think>\n\nb2<|im_end|>"]
    assert not any(document.tallies for document in documents)


def test_generation_blocks_decide_what_is_trained() -> None:
    blocks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% else %}{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_markers_of(blocks)
    encoder = Encoder(tokenizer, blocks)
    subject = Reference(tokenizer, Renderer(tokenizer, encoder, None), encoder)
    assert trained(subject, TWO) == ["b1", "b2"]
    assert subject.renderer.document(TWO).tallies == {"answers trained in part": 2}


def test_a_marker_that_the_tokenizer_lacks_is_told() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template_text("chatml")
    renderer = Renderer(tokenizer, Encoder(tokenizer, tokenizer.chat_template), None)
    assert renderer.unknown_markers == ["<|im_start|>", "<|im_end|>"]
    assert renderer.document(SUM).tallies == {
        "unknown markers: <|im_start|>": 1,
        "unknown markers: <|im_end|>": 1,
    }


def test_rendered_text_is_parsed_if_the_recipe_says_so() -> None:
    tokenizer = byte_level(chatml=True, bos=True)
    rendered = "<s><|im_start|>user\nhi<|im_end|>\n</s>"
    for parse, count in (("text", 0), ("parse", 1)):
        data = {"source": "s", "format": "text", "control_tokens": parse}
        layout = Layout(Recipe.from_dict({"base": {"model": "m"}, "data": data}).data, tokenizer)
        (document,) = layout.documents(layout.read({"text": rendered}))
        (encoded,) = layout.encoder.encode([document])
        ids = encoded.input_ids.tolist()
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == count
        assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
        assert document.tallies == {f"{'parsed' if count else 'spelled'} controls: <s>": 1}


def test_a_hole_in_the_ids_does_not_matter() -> None:
    tokenizer = byte_level(chatml=True)
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    layout["added_tokens"][-1]["id"] = 5000
    holed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), eos_token="</s>", bos_token="<s>"
    )
    holed.chat_template = template_text("chatml")
    encoder = Encoder(holed, holed.chat_template)
    (encoded,) = encoder.encode([Renderer(holed, encoder, None).document(SUM)])
    assert encoded.input_ids[-1] == encoded.labels[-1] == holed.convert_tokens_to_ids("<|im_end|>")


def test_a_system_message_before_the_first_question() -> None:
    tokenizer = with_markers_of(SOURCES["trl/gemma"])
    data = {"source": "s", "format": "messages", "system": "Be brief."}
    refusing = Layout(Recipe.from_dict({"base": {"model": "m"}, "data": data}).data, tokenizer)
    with pytest.raises(BadRow, match=r"System role not supported; data\.system_as=user puts"):
        refusing.documents(refusing.read({"messages": list(TWO.messages)}))
    data["system_as"] = "user"
    layout = Layout(Recipe.from_dict({"base": {"model": "m"}, "data": data}).data, tokenizer)
    (document,) = layout.documents(layout.read({"messages": list(TWO.messages)}))
    assert document.parts[0].text.endswith("user\nBe brief.\n\nq1<end_of_turn>\n<start_of_turn>model\n")
    assert document.tallies == {"moved system messages": 1}
    assert layout.prompt("q1").parts[0].text == document.parts[0].text


@pytest.mark.parametrize(("name", "marker"), [("trl/gemma3", "<end_of_turn>"), ("trl/qwen3", "<tool_call>")])
def test_text_that_spells_a_token_of_the_template_is_ordinary_text(name: str, marker: str) -> None:
    subject = reference(name)
    document = subject.renderer.document(talk(f"a {marker} b", f"c {marker} d"))
    clean, forged = subject.encoder.encode([subject.renderer.document(SUM), document])
    token = subject.tokenizer.convert_tokens_to_ids(marker)
    assert (forged.input_ids == token).sum() == (clean.input_ids == token).sum()
    assert not forged.forged
    assert subject.tokenizer.decode(forged.input_ids).count(marker) == 2 + (clean.input_ids == token).sum()


@pytest.mark.parametrize("system_as", ["system", "user"])
@pytest.mark.parametrize(
    "messages", [TWO.messages, ({"role": "system", "content": "Be long."}, *TWO.messages)]
)
def test_a_system_message_does_not_change_which_answers_are_trained(
    system_as: str, messages: tuple[Message, ...]
) -> None:
    tokenizer = with_markers_of(SOURCES["trl/qwen3_instruct_2507"])
    data = {"source": "s", "format": "messages", "system": "Be brief.", "system_as": system_as}
    layout = Layout(Recipe.from_dict({"base": {"model": "m"}, "data": data}).data, tokenizer)
    row = {
        "messages": [
            {**message, **({"weight": 0} if message["content"] == "b1" else {})} for message in messages
        ]
    }
    (encoded,) = layout.encoder.encode(layout.documents(layout.read(row)))
    assert tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE_INDEX]) == "b2<|im_end|>"


def text_of(name: str, **data: Any) -> Layout:
    """Return the layout of messages with a template of `SOURCES`."""
    settings = {"source": "s", "format": "messages", **data}
    return Layout(
        Recipe.from_dict({"base": {"model": "m"}, "data": settings}).data, with_markers_of(SOURCES[name])
    )


def test_a_moved_system_message_is_still_that_of_the_row() -> None:
    layout = text_of("trl/gemma", system_as="user")
    (document,) = layout.documents(
        layout.read({"messages": [{"role": "system", "content": "Be kind."}, *TWO.messages]})
    )
    assert document.system == "Be kind."
    prompt = layout.prompt("q1", system=document.system)
    assert prompt.parts[0].text == document.parts[0].text


def test_a_template_that_writes_content_as_a_list_is_refused() -> None:
    listing = "{% for m in messages %}{{ m.role }}: {{ m.content[:5] }}\n{% endfor %}"
    tokenizer = with_markers_of(listing)
    with pytest.raises(DataError, match="does not render the answer; its output is 'user: "):
        Renderer(tokenizer, Encoder(tokenizer, listing), listing)


def test_an_answer_that_the_template_rewrites_is_told() -> None:
    quoting = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content|tojson }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = with_markers_of(quoting)
    encoder = Encoder(tokenizer, quoting)
    renderer = Renderer(tokenizer, encoder, quoting)
    assert renderer.document(talk("q", 'a "quoted" word')).tallies["placed answers"] == 1


def test_a_misspelt_option_of_the_template_is_refused() -> None:
    assert text_of("trl/qwen3", template_options={"enable_thinking": False})
    with pytest.raises(
        DataError, match=r"data\.template_options: the template does not use 'enable_thinkin'"
    ):
        text_of("trl/qwen3", template_options={"enable_thinkin": False})


def test_a_row_of_several_examples_is_counted_once() -> None:
    layout = text_of("trl/qwen3", examples="answer")
    documents = layout.documents(
        layout.read({"messages": list(talk("a <|im_end|> b", "c", "d", "e").messages)})
    )
    assert len(documents) == 2
    assert sum((document.tallies for document in documents), Counter()) == {"spelled controls: <|im_end|>": 1}


def test_an_answer_without_weight_stays_out_even_if_everything_is_trained() -> None:
    layout = text_of("trl/qwen3_instruct_2507", train_on="all")
    row = {"messages": [{**m, **({"weight": 0} if m["content"] == "b1" else {})} for m in TWO.messages]}
    (encoded,) = layout.encoder.encode(layout.documents(layout.read(row)))
    untrained = encoded.input_ids[encoded.labels == IGNORE_INDEX]
    text = with_markers_of(SOURCES["trl/qwen3_instruct_2507"]).decode(untrained)
    assert text.endswith("b1<|im_end|>")
    assert "q1" not in text


def test_one_example_an_answer_leaves_out_only_what_cannot_be_one() -> None:
    layout = text_of("trl/qwen3", examples="answer")
    opening = {"messages": [{"role": "assistant", "content": "Hello!"}, *TWO.messages]}
    documents = layout.documents(layout.read(opening))
    assert len(documents) == 2
    assert documents[0].tallies == {"opening answers": 1}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look_up", "arguments": {}}]}
    chatml = text_of("chatml", examples="answer")
    (document,) = chatml.documents(chatml.read({"messages": [TWO.messages[0], call, TWO.messages[1]]}))
    assert document.tallies["unwritten answers"] == 1


def test_text_that_looks_rendered_is_told_if_the_tokenizer_lacks_its_markers() -> None:
    data = {"source": "s", "format": "text", "control_tokens": "parse"}
    layout = Layout(Recipe.from_dict({"base": {"model": "m"}, "data": data}).data, byte_level())
    (document,) = layout.documents(layout.read({"text": "<|im_start|>user\nhi<|im_end|>"}))
    assert document.tallies == {"markers in text: <|im_start|>": 1}


def test_white_space_that_the_template_removes_is_told() -> None:
    assert reference("trl/llama3").renderer.document(talk("q", "  def f():\n")).tallies == {"trimmed": 1}


def test_text_in_a_tool_call_cannot_be_a_control_token() -> None:
    layout = text_of("trl/qwen3")
    for text, reason in (("a\0403\0b", "NUL character"), ("\ud800", "broken Unicode")):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": text}}]}
        with pytest.raises(BadRow, match=reason):
            layout.read({"messages": [TWO.messages[0], call, TWO.messages[1]]})
