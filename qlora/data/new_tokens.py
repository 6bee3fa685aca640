"""New tokens of a tokenizer: control tokens that a chat template writes and the tokenizer lacks, and tokens of rows.

A control token is special: the text of a row cannot spell it, and generated text does not show it. Any other new token
is part of the text.
"""

import json
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data.examples import Example
from qlora.data.layout import Layout
from qlora.errors import RecipeError
from qlora.recipe import Data


def missing_tokens(section: Data, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the control tokens, such as <|im_start|>, that the templates of `section` write and `tokenizer` lacks."""
    found = [marker for part in section.parts for marker in Layout(part, tokenizer).missing_markers]
    return list(dict.fromkeys(found))


def add_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], control: Collection[str]
) -> dict[int, list[int]]:
    """Add the tokens that `tokenizer` lacks, in place; those in `control` are special.

    Returns:
        For the id of each added token, the ids of the pieces that spelled it before.

    Raises:
        RecipeError: a token cannot be added, because the tokenizer changes its text.
    """
    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    pieces = {token: _spelled(tokenizer.backend_tokenizer, token) for token in new}
    tokenizer.add_tokens([AddedToken(token, special=token in control, normalized=False) for token in new])
    vocabulary = tokenizer.get_vocab()
    for token in new:
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [vocabulary.get(token)]:
            raise RecipeError(
                f"adapter.train_tokens: the tokenizer does not read {token!r} as one token; write it without spaces"
            )
    return {vocabulary[token]: pieces[token] for token in new}


def absent_tokens(ids: Iterable[int], examples: Iterable[Example]) -> list[int]:
    """Return those of these token ids that no example has, in order."""
    absent = set(ids)
    for example in examples:
        if not absent:
            break
        absent.difference_update(np.unique(example.input_ids).tolist())
    return sorted(absent)


def spelled_without(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> dict[int, list[int]]:
    """Return the ids of the pieces that would spell these added tokens if `tokenizer` did not have them."""
    ids = set(ids)
    if not ids:
        return {}
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    contents = {token["id"]: token["content"] for token in stored["added_tokens"] if token["id"] in ids}
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] not in ids]
    before = Tokenizer.from_str(json.dumps(stored))
    return {number: _spelled(before, content) for number, content in contents.items()}


def _spelled(backend: Tokenizer, token: str) -> list[int]:
    ids: list[int] = backend.encode(token, add_special_tokens=False).ids
    return ids
