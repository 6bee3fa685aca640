"""A folder for Ollama: the model as GGUF, and a Modelfile with template, stop words and system prompt."""

from pathlib import Path

from qlora.errors import ModelError
from qlora.export.gguf_model import Exported, draft_model
from qlora.export.go_templates import go_template
from qlora.export.source import ModelSource
from qlora.merging.merge import Progress
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import save_errors

MODEL, MODELFILE = "model.gguf", "Modelfile"

CONTEXT = 8192
"""most tokens of context that a Modelfile asks for, because Ollama reserves memory for all of them"""


def write_ollama(
    source: ModelSource,
    to: Path,
    *,
    kind: str = "bf16",
    progress: Progress = lambda what, done, total: None,
) -> Exported:
    """Write a model and its Modelfile into the new folder `to`.

    Args:
        source: the model.
        to: the folder; it must not exist, and appears only when it is complete.
        kind: number format of the matrices, as in `write_model`.
        progress: called for each tensor.

    Raises:
        UsageError: the folder exists, or the package gguf is missing.
        ModelError: no Go template is known for the model's chat template, or as `write_model`.
        SaveError: a file cannot be written. Nothing remains of the folder.
    """
    check_absent(to)
    text = modelfile(source)
    with drafting(to) as drafts:
        draft = drafts / "ollama"
        with save_errors(to):
            draft.mkdir()
            (draft / MODELFILE).write_text(text, encoding="utf-8")
        written = draft_model(source, draft / MODEL, to, kind=kind, progress=progress)
        publish(draft, to)
    return Exported(to, written.bytes, written.tensors, kind, written.notes)


def modelfile(source: ModelSource) -> str:
    """Return the Modelfile of a model. Raises ModelError if no Go template is known for its chat template."""
    template: str | None = "{{ .Prompt }}"
    if source.template is not None:
        template = go_template(source.template, source.tokenizer)
    if template is None:
        raise ModelError(
            "Ollama reads Go templates, and qlora knows none that writes the text of this chat template. `--to gguf` "
            "writes a file that holds the template itself, which llama.cpp reads; or train with a named template (see "
            "data.template)"
        )
    ids = {source.vocabulary.ids["eos"], *(source.prompts.stop_ids if source.prompts else ())}
    stops = [str(source.tokenizer.convert_ids_to_tokens(number)) for number in sorted(ids)]
    lines = [f"FROM ./{MODEL}", f"TEMPLATE {_quoted(template)}"]
    if source.system:
        lines.append(f"SYSTEM {_quoted(source.system)}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {min(source.settings.context, CONTEXT)}"]) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ModelError(
            'the system prompt or the template holds """, which a Modelfile cannot; `--to gguf` needs no Modelfile'
        )
    return f'"""{text}"""'
