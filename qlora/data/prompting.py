"""What decides how a prompt becomes token ids, as digests: an adapter works with the prompts it was trained on."""

import hashlib
import json

from transformers import PreTrainedTokenizerFast

from qlora.data.layout import template_of
from qlora.recipe import Data


def prompting(section: Data, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """BLAKE2b-128 of the tokenizer's vocabulary and of the template that `section` writes rows with.

    Raises DataError if the template is missing.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer": _digest(json.dumps(vocabulary)),
        "template": _digest(template_of(section, tokenizer) or ""),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
