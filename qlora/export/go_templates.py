"""Chat templates in the language of Ollama (Go's text/template), for the named templates that qlora knows.

Ollama puts bos in front itself. EOS and BOS take the place of the tokenizer's tokens. Go's templates cannot trim a
text, so a message with white space around it is written as it is.
"""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast as Tokenizer

from qlora.data.templates import NAMED, template_text
from qlora.model.load import load_tokenizer
from qlora.recipe import Base

_FIRST = "{{ if and $.System (eq $i 1) }}{{ $.System }}\n\n{{ end }}"
"""the system text as the beginning of the first question"""
_TURNS = (
    '{{ range .Messages }}{{ if ne .Role "system" }}'
    "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def _by_role(user: str, assistant: str, system: str = "", *, after: str) -> str:
    """Return a template that writes each message by its role, and `after` at the end."""
    return (
        f'{{{{ range $i, $m := .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}'
        f'{{{{ else if eq .Role "system" }}}}{system}{{{{ end }}}}{{{{ end }}}}{after}'
    )


GO = {
    "chatml": "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
    "qwen-2.5": "<|im_start|>system\n{{ if .System }}{{ .System }}{{ else }}" + _QWEN + "{{ end }}<|im_end|>\n"
    + _TURNS,
    "qwen-3": "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" + _TURNS,
    "llama-3": "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-2": _by_role(
        "{{ if gt $i 1 }}BOS{{ end }}[INST] {{ if and $.System (eq $i 1) }}<<SYS>>\n{{ $.System }}\n<</SYS>>\n\n"
        "{{ end }}{{ .Content }} [/INST]",
        " {{ .Content }} EOS",
        after="",
    ),
    "gemma": _by_role(
        "<start_of_turn>user\n" + _FIRST + "{{ .Content }}<end_of_turn>\n",
        "<start_of_turn>model\n{{ .Content }}<end_of_turn>\n",
        after="<start_of_turn>model\n",
    ),
    "mistral-v1": _by_role(" [INST] " + _FIRST + "{{ .Content }} [/INST]", " {{ .Content }}EOS", after=""),
    "mistral-v3": _by_role("[INST] " + _FIRST + "{{ .Content }}[/INST]", " {{ .Content }}EOS", after=""),
    "mistral-v3-tekken": _by_role("[INST]" + _FIRST + "{{ .Content }}[/INST]", "{{ .Content }}EOS", after=""),
    "mistral-v7-tekken": _by_role(
        "[INST]{{ .Content }}[/INST]", "{{ .Content }}EOS", "[SYSTEM_PROMPT]{{ .Content }}[/SYSTEM_PROMPT]", after=""
    ),
    "deepseek": _by_role(
        "<｜User｜>{{ .Content }}",
        "<｜Assistant｜>{{ .Content }}<｜end▁of▁sentence｜>",
        "{{ .Content }}",
        after="<｜Assistant｜>",
    ),
    "zephyr": "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}EOS\n{{ end }}<|assistant|>\n",
    "vicuna": "{{ if .System }}{{ .System }}{{ else }}" + _VICUNA + "{{ end }}"
    + _by_role(
        "{{ if or (eq $i 0) (and $.System (eq $i 1)) }} {{ end }}USER: {{ .Content }}",
        " ASSISTANT: {{ .Content }}EOS",
        after=" ASSISTANT:",
    ),
    "alpaca": "{{ if .System }}{{ .System }}{{ else }}" + _ALPACA + "{{ end }}"
    + _by_role(
        "\n\n### Instruction:\n{{ .Content }}", "\n\n### Response:\n{{ .Content }}EOS", after="\n\n### Response:\n"
    ),
    "plain": _by_role(
        "Question: {{ .Content }}\n", "Answer: {{ .Content }}EOS\n\n", "{{ .Content }}\n\n", after="Answer:"
    ),
    "bundled": _by_role(
        "Question: {{ .Content }}\n", "Answer: {{ .Content }}EOS", "{{ .Content }}\n\n", after="Answer:"
    ),
}  # fmt: skip
"""by the name of the template; bundled is the one of the small base's tokenizer"""

_Q, _A, _S = (
    {"role": role, "content": text}
    for role, text in (("user", "one"), ("assistant", "two"), ("system", "three"))
)
CONVERSATIONS: Sequence[list[dict[str, str]]] = (
    [_Q], [_S, _Q], [_Q, _A, _Q], [_S, _Q, _A, _Q], [_S, _Q, _A, _Q, _A, _Q], [_Q, _A, _Q, _A, _Q],
)  # fmt: skip


def jinja(name: str) -> str:
    """Return the jinja source of a template of GO."""
    if name in NAMED:
        return template_text(name)
    return str(load_tokenizer(Base(model=f"{name}/base")).get_chat_template())


def rendered(template: str, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str | None:
    """Return a prompt as transformers writes it, without bos in front; None if the template refuses the messages."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        return None
    return str(text).removeprefix(tokenizer.bos_token or "")


def go_template(template: str, tokenizer: Tokenizer) -> str | None:
    """Return the Go template that writes what a jinja template writes; None if none of GO does.

    Two templates are the same if they write the same text for conversations of each shape.
    """
    texts = [rendered(template, tokenizer, messages) for messages in CONVERSATIONS]
    for name, go in GO.items():
        if texts == [rendered(jinja(name), tokenizer, messages) for messages in CONVERSATIONS]:
            return go.replace("EOS", tokenizer.eos_token).replace("BOS", tokenizer.bos_token or "")
    return None
