"""Finds the damaged file of a base, to name it when transformers cannot read them."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from qlora.errors import ModelError, first_line
from qlora.storage import regular_file
from qlora.storage.safetensors_files import checkpoint_files, find_checkpoint, stored_tensors

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json", "config.json",  # which names the class of a tokenizer without its own configuration
)  # fmt: skip
WEIGHT_FILES = ("model.safetensors.index.json",)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


PACKED_EXPERT = re.compile(r"\.experts\.(\d+|\w+_projs?)\.(.*\.)?quant_state\.bitsandbytes__\w+$")
"""statistic of 4-bit weights of experts"""


def packed_expert(location: str, revision: str) -> str | None:
    """Return the name of the first 4-bit weight of experts in a checkpoint on this machine; None if there is none."""
    try:
        files = checkpoint_files(find_checkpoint(location, revision))
        names = (tensor.name for file in files for tensor in stored_tensors(file))
        found = next((name for name in names if PACKED_EXPERT.search(name)), None)
    except (ModelError, OSError, ValueError):
        return None  # loading says what is wrong with it
    return None if found is None else found.partition(".quant_state.")[0]


def damaged_config(folder: Path) -> str | None:
    """Return which file of the configuration is no JSON object, and why; None if all are.

    transformers ignores a generation_config.json that it cannot read, and so the tokens that end an answer.
    """
    return _first_not_json(folder, CONFIG_FILES)


def damaged_tokenizer(folder: Path) -> str | None:
    """Return which file of the tokenizer cannot be read, and why; None if each can be read by itself."""
    problem = _first_not_json(folder, TOKENIZER_FILES)
    file = folder / "tokenizer.json"
    if problem is None and file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except BaseException as error:  # noqa: BLE001 - the library also panics, which is no Exception
            problem = _named(file, error)
    return problem


def damaged_weights(folder: Path) -> str | None:
    """Return which file of the weights is missing or cannot be read, and why; None if all headers are whole."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and (pickles := [path.name for pattern in PICKLES for path in folder.glob(pattern)]):
        return (
            f"{pickles[0]} is a pickle, which can run code when it is read, so qlora reads only safetensors. Convert "
            "it in a place that you trust: from_pretrained(...) and save_pretrained(...) of transformers write "
            "model.safetensors"
        )
    if (problem := _first_not_json(folder, WEIGHT_FILES)) is not None:
        return problem
    for file in files:
        try:
            regular_file.check(file)
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (OSError, SafetensorError, ValueError) as error:
            return _named(file, error)
    return None if files else "model.safetensors is missing"


def _first_not_json(folder: Path, names: tuple[str, ...]) -> str | None:
    """Return what is wrong with the first of these files that is there and is no JSON object."""
    for file in (folder / name for name in names):
        try:
            if file.is_file() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                return f"{file.name} is not a JSON object"
        except (OSError, ValueError, RecursionError) as error:
            return _named(file, error)
    return None


def _named(file: Path, error: BaseException) -> str:
    return f"{file.name} cannot be read: {first_line(error)}"
