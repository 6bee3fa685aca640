"""New tokens of a tokenizer: the control tokens that a chat template writes and the tokenizer lacks."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data.layout import Layout
from qlora.errors import RecipeError
from qlora.recipe import Data


def missing_tokens(section: Data, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the control tokens, such as <|im_start|>, that the templates of `section` write and `tokenizer` lacks."""
    found = [marker for part in section.parts for marker in Layout(part, tokenizer).missing_markers]
    return list(dict.fromkeys(found))


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add the tokens that `tokenizer` lacks, in place, as special tokens.

    Returns:
        For the id of each added token, the ids of the pieces that spelled it before.

    Raises:
        RecipeError: a token cannot be added, because the tokenizer changes its text.
    """
    vocabulary = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    pieces = {token: _spelled(tokenizer.backend_tokenizer, token) for token in new}
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    vocabulary = tokenizer.get_vocab()
    for token in new:
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [vocabulary.get(token)]:
            raise RecipeError(
                f"adapter.train_tokens: the tokenizer does not read {token!r} as one token; write it without spaces"
            )
    return {vocabulary[token]: pieces[token] for token in new}


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
