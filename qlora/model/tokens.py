"""Tokenizer of a run: that of its base, with the tokens that the run trains; see `qlora.adapter.trained_rows`.

The tokenizer follows from the recipe. So training, evaluation, chat and merging get the same one, and the digest of its
vocabulary, recorded with the adapter, detects a change.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerFast as Tokenizer

from qlora.adapter.trained_rows import embedding_and_head, plain, train_rows
from qlora.data.examples import Example
from qlora.data.new_tokens import absent_tokens, add_tokens, missing_tokens, spelled_without
from qlora.errors import RecipeError, listed
from qlora.model.load import load_tokenizer
from qlora.recipe import Recipe

NEW = "new"
"""value of `adapter.train_tokens` for all tokens that the base does not have"""


@dataclass(frozen=True)
class TrainedTokens:
    """Tokens whose rows a run trains, and the tokenizer with them."""

    tokenizer: Tokenizer
    ids: list[int]
    """of the tokens that the recipe names, or that its template writes and the base's tokenizer lacks"""
    spelled: dict[int, list[int]]
    """of each token that was added: the ids of the pieces that spelled it before"""
    all_new: bool
    """True to train also the tokens for which the base's embedding has no row"""

    @classmethod
    def of(cls, recipe: Recipe) -> "TrainedTokens":
        """Load the tokenizer of the recipe's base and add the tokens that the recipe trains.

        Raises:
            ModelError: the base has no tokenizer.
            RecipeError: a token cannot be added.
        """
        base, wanted = recipe.base, recipe.adapter.train_tokens
        if base.model.endswith(".json"):  # an estimate from a config file, which has no tokenizer
            base = base.model_copy(update={"init": "synthetic"})
        tokenizer = load_tokenizer(base)
        control = missing_tokens(recipe.data, tokenizer) if wanted else []
        names = control if wanted == NEW else list(wanted)
        spelled = add_tokens(tokenizer, names, control) if names else {}
        ids = [tokenizer.get_vocab()[name] for name in dict.fromkeys(names)]
        return cls(tokenizer, ids, spelled, wanted == NEW)

    def check_rows(self, examples: Iterable[Example]) -> None:
        """Check that each token that the recipe names occurs in the training rows.

        Raises:
            RecipeError: one does not, so the run would learn only to avoid it.
        """
        if self.all_new or not (absent := absent_tokens(self.ids, examples)):
            return
        names = self.tokenizer.convert_ids_to_tokens(absent)
        added = self.tokenizer.added_tokens_decoder
        special = [token.content for number in absent if (token := added.get(number)) and token.special]
        hint = (
            f"; {listed(special)}: text cannot spell a control token, unless data.control_tokens is parse"
            if special
            else ""
        )
        raise RecipeError(
            f"adapter.train_tokens: no training row has {listed(names)}, so the run would learn nothing about it. "
            f"Leave it out, or use rows that have it{hint}"
        )

    def train(self, model: nn.Module) -> None:
        """Train the rows of the tokens in `model`, in place.

        Raises:
            QloraError: there is no such token; or as `train_rows`.
        """
        embedding, _ = embedding_and_head(model)
        rows = len(plain(model.get_submodule(embedding)).weight)
        beyond = [number for number in self.tokenizer.get_vocab().values() if number >= rows]
        ids = sorted({*self.ids, *(beyond if self.all_new else ())})
        if not ids:
            raise RecipeError(
                "adapter.train_tokens: new finds nothing to train: the template writes no token that the tokenizer of "
                "the base lacks, and the embedding has a row for every token. Leave this key out, or name tokens"
            )
        old = set(beyond).intersection(ids) - self.spelled.keys()
        train_rows(model, ids, {**self.spelled, **spelled_without(self.tokenizer, old)})


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """Load the tokenizer of a run, with the tokens that it trains. Raises QloraError as `TrainedTokens.of`."""
    return TrainedTokens.of(recipe).tokenizer
