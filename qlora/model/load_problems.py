"""Messages about a base that cannot be loaded."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import ModelError, QloraError, first_line
from qlora.model.locate import locate
from qlora.recipe import Base
from qlora.runtime.out_of_memory import is_out_of_memory
from qlora.storage import regular_file


@contextmanager
def damage_named(base: Base, damaged: Callable[[Path], str | None], otherwise: str) -> Iterator[None]:
    """Turn any error of transformers while it reads the base into a ModelError that names the damaged file.

    Args:
        base: the recipe's `base` section.
        damaged: finds the damaged file in a folder.
        otherwise: the file to name if each file can be read by itself.
    """
    try:
        yield
    except (QloraError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # anything from transformers; a panic of tokenizers is no Exception
        if is_out_of_memory(error):
            raise
        folder = Path(locate(base))
        if unfit := not_causal(error):
            raise ModelError(f"base.model: cannot load {base.model!r}: {unfit}") from error
        problem = damaged(folder) if folder.is_dir() else None
        if problem is None and (not folder.is_dir() or code_wanted(error) or "architecture" in str(error)):
            raise ModelError(load_problem(base, error)) from error
        problem = problem or f"{otherwise} describes nothing that can be loaded ({first_line(error)})"
        raise ModelError(f"base.model: {base.model!r}: {problem}. Restore the folder from a copy") from error


def code_wanted(error: BaseException) -> str:
    """Return advice if transformers would have to run the model's own code, or else an empty string."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        "the model needs its own Python code to run. Read that code. If you trust it, set base.trust_remote_code=true, "
        "or add --trust-remote-code to a command that takes no recipe"
    )


def not_causal(error: BaseException) -> str:
    """Return advice if transformers has no causal language model for the configuration, or else an empty string."""
    found = re.search(r"Unrecognized configuration class .*?(\w+Config)\b", first_line(error))
    if found is None:
        return ""
    return (
        f"transformers has no causal language model for {found[1]} in config.json; it may be a model of images or "
        "sound. Use the text model alone: load it with transformers, save its language model, and set base.model to it"
    )


def load_problem(base: Base, error: BaseException) -> str:
    """Return a one-line error message that names the model and the remedy."""
    text = code_wanted(error) or first_line(error)
    from_hub = not Path(base.model).exists() and not base.model.startswith("bundled/")
    if from_hub and ("gated" in text.lower() or "401" in text or "403" in text):
        text = "the hub refuses access. Accept the model's licence there and log in with `hf auth login`"
    elif from_hub and not code_wanted(error):
        text = (
            "the hub cannot be reached or has no such model, and the model is not in the local cache. Check the name, "
            "download it on a machine with network access, or use a local folder"
        )
    elif "architecture" in text:
        kind = _model_type(base)
        text = f"transformers does not know the architecture in config.json ({kind}). Update it, or use another model"
    return f"base.model: cannot load {base.model!r}: {text}"


def _model_type(base: Base) -> str:
    try:
        return str(json.loads(regular_file.read(Path(locate(base)) / "config.json")).get("model_type"))
    except (OSError, ValueError):
        return "unknown"
