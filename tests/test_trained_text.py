"""Trained text of known templates and rows: the faults that were found, each with its right value."""

import json
from collections import Counter
from typing import Any

import pytest
from chat_templates_for_tests import SOURCES, Reference, reference, runs
from tokenizers import Tokenizer
from tokenizers_for_tests import byte_level, with_markers_of
from transformers import PreTrainedTokenizerFast

from qlora.data import IGNORE_INDEX
from qlora.data.encoding import Encoder
from qlora.data.layout import Layout
from qlora.data.rendering import Renderer
from qlora.data.templates import template_text
from qlora.errors import DataError
from qlora.formats import BadRow, Conversation, Message
from qlora.recipe import Recipe


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
    prompt = text_of("trl/qwen3", template_options={"enable_thinking": False}).prompt("q")
    assert prompt.parts[0].text.endswith("assistant\n<think>\n\n</think>\n\n")
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
