"""Compares the named chat templates with the texts that the publishers' own code and templates write."""

from importlib.resources import files

import pytest
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers_for_tests import byte_level, with_markers_of
from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Encoder
from qlora.data.rendering import Renderer
from qlora.data.templates import NAMED, template_text
from qlora.errors import DataError
from qlora.formats import BadRow, Conversation, Message

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is 2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
AGAIN = {"role": "user", "content": "And 3+3?\nIn words."}
LAST = {"role": "assistant", "content": "Six."}
CONVERSATIONS = {
    "one question": [QUESTION],
    "system and question": [SYSTEM, QUESTION],
    "two questions": [QUESTION, ANSWER, AGAIN],
    "one turn": [SYSTEM, QUESTION, ANSWER],
    "two turns": [QUESTION, ANSWER, AGAIN, LAST],
}


def tokenizer(bos: str = "<s>", eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer with these names of bos and eos, as templates write them."""
    made = byte_level()
    made.bos_token, made.eos_token = bos, eos
    return made


def rendered(
    template: str, messages: list[Message], using: PreTrainedTokenizerFast, **settings: object
) -> str:
    """Render as transformers does, with the generation prompt after a question."""
    asks = messages[-1]["role"] == "user"
    return str(
        using.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asks, **settings
        )
    )


def trl(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "published", "bos", "eos"),
    [
        ("llama-3", "llama3", "<|begin_of_text|>", "<|end_of_text|>"),
        ("gemma", "gemma3", "<bos>", "<eos>"),
        ("qwen-2.5", "qwen2_5", "", "<|im_end|>"),
        ("qwen-3", "qwen3_instruct_2507", "", "<|im_end|>"),
        ("phi-3", "phi3", "<s>", "<|endoftext|>"),
        ("phi-3", "phi3_5", "<s>", "<|endoftext|>"),
    ],
)
def test_a_template_writes_the_text_of_the_published_template(
    name: str, published: str, bos: str, eos: str, messages: list[Message]
) -> None:
    using = tokenizer(bos or "<s>", eos)
    theirs = rendered(trl(published), messages, using)
    if name == "phi-3" and messages[-1]["role"] == "assistant":
        # an answer ends with <|end|>; generation never reaches the eos that the publisher writes after it
        theirs = theirs.removesuffix("<|endoftext|>")
    assert rendered(template_text(name), messages, using) == theirs


@pytest.mark.parametrize("name", ["qwen-2.5", "qwen-3"])
def test_tools_and_their_calls_are_written_as_published(name: str) -> None:
    published = trl({"qwen-2.5": "qwen2_5", "qwen-3": "qwen3_instruct_2507"}[name])
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    results = [{"role": "tool", "content": "4"}, {"role": "tool", "content": "4"}]
    for start in ([], [SYSTEM]):
        messages = [*start, QUESTION, called, *results, ANSWER, AGAIN]
        ours, theirs = (
            rendered(template, messages, tokenizer(), tools=tools)
            for template in (template_text(name), published)
        )
        # without content, Qwen 2.5 writes no line break of its own before the first call
        assert ours == theirs


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_llama_3_is_metas_own_format(messages: list[Message]) -> None:
    from llama_models.datatypes import RawMessage

    theirs = Tokenizer.get_instance()
    own = ChatFormat(theirs)
    dialog = [RawMessage(role=message["role"], content=message["content"]) for message in messages]
    ids = (
        own.encode_dialog_prompt(dialog).tokens
        if messages[-1]["role"] == "user"
        else [
            theirs.special_tokens["<|begin_of_text|>"],
            *(token for message in dialog for token in own.encode_message(message, None)[0]),
        ]
    )
    using = tokenizer("<|begin_of_text|>", "<|end_of_text|>")
    assert rendered(template_text("llama-3"), messages, using) == theirs.decode(ids)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("name", "version", "sentencepiece"),
    [
        ("mistral-v1", TokenizerVersion.v1, True),
        ("mistral-v3", TokenizerVersion.v3, True),
        ("mistral-v3-tekken", TokenizerVersion.v3, False),
        ("mistral-v7-tekken", TokenizerVersion.v7, False),
    ],
)
def test_mistral_templates_write_the_text_of_mistral_common(
    name: str, version: TokenizerVersion, sentencepiece: bool, messages: list[Message]
) -> None:
    no = False
    published = generate_chat_template(sentencepiece, version, no, no, no, None, no, True, None, None, None)
    assert rendered(template_text(name), messages, tokenizer()) == rendered(published, messages, tokenizer())


def test_mistral_templates_match_the_tokens_of_the_real_tokenizers() -> None:
    made = {
        "mistral-v1": MistralTokenizer.v1(),
        "mistral-v3": MistralTokenizer.v3(),
        "mistral-v3-tekken": MistralTokenizer.v3(is_tekken=True),
    }
    for name, real in made.items():
        for messages in ([QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, AGAIN]):
            ids = real.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
            text = real.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)
            text = text.replace("▁", " ").replace("<0x0A>", "\n")
            assert rendered(template_text(name), messages, tokenizer()) == text


LITERAL = {
    # Touvron et al. 2023 and llama/generation.py of meta-llama/llama
    "llama-2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2+2? [/INST] It is 4. </s>"
        "<s>[INST] And 3+3?\nIn words. [/INST]"
    ),
    # DeepSeek-V3's tokenizer_config.json
    "deepseek": (
        "<s>Be brief.<｜User｜>What is 2+2?<｜Assistant｜>It is 4.<｜end▁of▁sentence｜>"
        "<｜User｜>And 3+3?\nIn words.<｜Assistant｜>"
    ),
    # model cards of microsoft/Phi-4-mini-instruct and microsoft/phi-4
    "phi-4-mini": (
        "<|system|>Be brief.<|end|><|user|>What is 2+2?<|end|><|assistant|>It is 4.<|end|>"
        "<|user|>And 3+3?\nIn words.<|end|><|assistant|>"
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>What is 2+2?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>It is 4.<|im_end|><|im_start|>user<|im_sep|>And 3+3?\nIn words.<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    # model card of HuggingFaceH4/zephyr-7b-beta
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2+2?</s>\n<|assistant|>\nIt is 4.</s>\n"
        "<|user|>\nAnd 3+3?\nIn words.</s>\n<|assistant|>\n"
    ),
    # conv_vicuna_v1.1 of lm-sys/FastChat
    "vicuna": (
        "<s>Be brief. USER: What is 2+2? ASSISTANT: It is 4.</s>USER: And 3+3?\nIn words. ASSISTANT:"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
        "It is 4.<|im_end|>\n<|im_start|>user\nAnd 3+3?\nIn words.<|im_end|>\n<|im_start|>assistant\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LITERAL)
def test_a_template_writes_the_documented_format(name: str) -> None:
    messages = [SYSTEM, QUESTION, ANSWER, AGAIN]
    assert rendered(template_text(name), messages, tokenizer()) == LITERAL[name]


def test_vicunas_opening_is_fastchats() -> None:
    assert rendered(template_text("vicuna"), [QUESTION], tokenizer()) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What is 2+2? ASSISTANT:"
    )


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"alpaca", "plain", "chatml"}))
def test_a_role_that_the_family_lacks_is_refused_by_name(name: str) -> None:
    using = byte_level()
    renderer = Renderer(using, Encoder(using), template_text(name))
    with pytest.raises(BadRow, match="oracle"):
        renderer.prompt([{"role": "oracle", "content": "?"}, QUESTION])


@pytest.mark.parametrize("name", NAMED)
def test_every_answer_follows_the_prompt_that_poses_its_question(name: str) -> None:
    using = tokenizer()
    template = template_text(name)
    for start in ([], [SYSTEM]):
        messages = [*start, QUESTION, ANSWER, AGAIN, LAST]
        whole = rendered(template, messages, using)
        for end in (len(start) + 1, len(start) + 3):
            assert whole.startswith(rendered(template, messages[:end], using))


@pytest.mark.parametrize("name", NAMED)
def test_each_answer_and_its_end_are_trained(name: str) -> None:
    template = template_text(name)
    using = with_markers_of(template)
    document = Renderer(using, Encoder(using, template), template).document(
        Conversation((SYSTEM, QUESTION, ANSWER, AGAIN, LAST))
    )
    trained = [part.text for part in document.parts if part.trained]
    assert not document.tallies
    assert [text.split("<")[0].strip() for text in trained] == ["It is 4.", "Six."]


def test_an_unknown_name_is_answered_with_the_names() -> None:
    with pytest.raises(
        DataError, match=r"'mistral' is not a template; set it to alpaca, .*mistral-v3, .*zephyr"
    ):
        template_text("mistral")
