"""Digests of the tokenizer and template, to check that an adapter gets prompts as in its training."""

import hashlib
import json

from transformers import PreTrainedTokenizerFast

from qlora.data.layout import template_of
from qlora.recipe import Data


def prompt_digests(section: Data, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return BLAKE2b-128 digests of the tokenizer's vocabulary and of the template that `section` uses.

    Raises DataError if the template is missing or cannot be read.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer": _digest(json.dumps(vocabulary)),
        "template": _digest(template_of(section, tokenizer) or ""),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
