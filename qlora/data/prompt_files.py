"""Files with which other programs ask a trained model as its training rows did, and stop where its answers end.

    chat_template.jinja      the template that the rows were written with
    tokenizer_config.json    eos_token: the token that closes an answer
    config.json              eos_token_id: every token that ends an answer, if the model's configuration takes several
    generation_config.json   eos_token_id: every token that ends an answer
    system_prompt.txt        the system message that all training rows share, if they share one; only qlora reads it

Servers differ in the file that they read, so all of them must agree.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from qlora.data.prompts import KEEP_START, Prompts
from qlora.errors import ModelError
from qlora.storage import regular_file
from qlora.storage.json_files import read_object, write_object

TEMPLATE_FILE = "chat_template.jinja"
SYSTEM_FILE = "system_prompt.txt"


def write_prompt_files(folder: Path, prompts: Prompts) -> None:
    """Change these files in a folder with a tokenizer, and with a model if it has a config.json, to agree.

    A file that needs no change keeps its bytes. generation_config.json is made if there is none.

    Args:
        folder: folder of a model, or of an adapter with its tokenizer.
        prompts: prompts of the training data.

    Raises:
        ModelError: a file is not a JSON object.
    """
    eos = prompts.tokenizer.eos_token
    closing = closing_token(prompts)
    template = prompts.template
    if closing != eos:
        own = prompts.tokenizer.chat_template and prompts.tokenizer.get_chat_template()
        template = _with_old_eos(template if template is not None else own, eos)
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        _change(folder / "tokenizer_config.json", chat_template=None)
    if closing != eos:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            _change(folder / name, eos_token=closing)
    write_system(folder, prompts.system)
    if (folder / "config.json").is_file():
        _end_generation(folder, prompts)


def write_system(folder: Path, system: str | None) -> None:
    """Write the system message that all training rows share, if they share one."""
    if system:
        (folder / SYSTEM_FILE).write_text(system, encoding="utf-8", newline="")


def shared_system(folder: Path) -> str | None:
    """Return the system message that all training rows of this result share; None if they share none.

    Raises:
        ModelError: the file cannot be read.
    """
    path = folder / SYSTEM_FILE
    try:
        return regular_file.read_text(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Restore the file, or remove it") from error


def closing_token(prompts: Prompts) -> str:
    """Return the token that closes an answer: the template's own if it has one, else eos."""
    tokenizer = prompts.tokenizer
    others = prompts.stop_ids - {tokenizer.eos_token_id}
    return str(tokenizer.convert_ids_to_tokens(min(others)) if len(others) == 1 else tokenizer.eos_token)


def _end_generation(folder: Path, prompts: Prompts) -> None:
    """Name the tokens that end an answer, next to those that the model already names."""
    config = read_object(folder / "config.json")
    path = folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    named = [settings.get("eos_token_id") for settings in (config, generation)]
    before = {
        end for ends in named for end in (ends if isinstance(ends, list) else [ends]) if end is not None
    }
    ends = sorted(before | prompts.stop_ids)
    files = [(folder / "config.json", config), (path, generation)]
    for file, settings in files if len(ends) == 1 or _takes_several_ends(config) else files[1:]:
        if settings.get("eos_token_id") not in (ends, ends[0] if len(ends) == 1 else ends):
            write_object(file, {**settings, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _takes_several_ends(config: dict[str, Any]) -> bool:
    """Return False if transformers' class for this config.json accepts one end token only, as Inkling's does."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    known = model_type in CONFIG_MAPPING
    kind = CONFIG_MAPPING[model_type] if known else None  # its `get` knows no class that is not loaded yet
    own = fields(kind) if is_dataclass(kind) else ()
    return all("list" in str(one.type) for one in own if one.name == "eos_token_id")


def _with_old_eos(template: str | None, eos: str) -> str | None:
    """Let a template that writes the tokenizer's old eos still write it, after another token became eos."""
    if template is None or "eos_token" not in template:
        return template
    return f"{{% set eos_token = {json.dumps(eos, ensure_ascii=False)} %}}" + KEEP_START + template


def _change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, or remove those with None. A file that is missing or needs no change is left alone."""
    if not path.is_file():
        return
    before = read_object(path)
    after = {
        key: value for key, value in {**before, **values}.items() if key not in values or value is not None
    }
    if after != before:
        write_object(path, after)
