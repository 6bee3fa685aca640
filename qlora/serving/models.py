"""The models that a server offers by name: the adapters of one base, each with its own prompts, and the base."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapter.switch import Adapters
from qlora.data import Prompts
from qlora.data.prompt_files import shared_system
from qlora.errors import QloraError, UsageError
from qlora.inference.generate import end_ids
from qlora.inference.load import recipe_of
from qlora.inference.named_adapters import BASE, NamedAdapters, open_adapters
from qlora.serving.api_error import ApiError
from qlora.serving.parameters import Wanted, shown

DEFAULT_CONTEXT = 4096
"""most tokens of a request, prompt and answer, unless another number is asked for"""

OTHER_PROCESSORS = (
    "no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "min_length", "min_new_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "guidance_scale",
)  # fmt: skip
"""settings of a generation config that would change the most likely token, and that the server does not apply"""


@dataclass(frozen=True)
class Served:
    """A model to choose by name."""

    name: str
    adapter: str | None
    """the adapter that computes it; None for the base, or if all weights were trained"""
    prompts: Prompts


@dataclass
class Models:
    """A base in memory and the models that it can compute.

    Prompts are encoded by one thread at a time, because tokenizers cannot be shared by threads.
    """

    model: nn.Module
    tokenizer: Any
    adapters: Adapters | None
    served: dict[str, Served]
    context: int
    """most tokens of a request, prompt and answer"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def named(self, name: str) -> Served:
        """Return the model `name`. Raises ApiError (404) if there is none."""
        if name not in self.served:
            raise ApiError(
                404,
                f"there is no model {shown(name)}; there are {', '.join(self.served)}",
                param="model",
                code="model_not_found",
            )
        return self.served[name]

    def ends(self, model: Served) -> frozenset[int]:
        """Return the tokens that end an answer."""
        return frozenset(end_ids(self.model, self.tokenizer, model.prompts.stop_ids))

    @property
    def repetition_penalty(self) -> float:
        """Penalty in the model's generation config, which every answer of the model in transformers gets."""
        return float(getattr(self.model.generation_config, "repetition_penalty", None) or 1.0)

    @property
    def not_applied(self) -> list[str]:
        """Settings of the model's generation config that answers of this server do without."""
        config = self.model.generation_config
        return [name for name in OTHER_PROCESSORS if getattr(config, name, None) not in (None, 0, 1, [], {})]

    def encode(self, model: Served, wanted: Wanted) -> list[int]:
        """Return the token ids of a request's prompt.

        Raises:
            ApiError: the text cannot be encoded, or is too long.
        """
        self._check_length(wanted)
        with self._lock:
            try:
                ids = _encode(model.prompts, wanted)
            except QloraError as error:
                raise ApiError(400, str(error), param="messages" if wanted.messages else "prompt") from error
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        room = self.context - len(ids)
        if room < 1 or (wanted.max_tokens or 0) > room:
            asked = f" and the answer up to {wanted.max_tokens:,}" if wanted.max_tokens else ""
            raise ApiError(
                400,
                f"the prompt has {len(ids):,} tokens{asked}, but prompt and answer together may have {self.context:,}; "
                "shorten the prompt or ask for fewer tokens",
                param="messages" if wanted.messages else "prompt",
                code="context_length_exceeded",
            )
        return ids

    def _check_length(self, wanted: Wanted) -> None:
        """Refuse a prompt that must be too long before the work of encoding it, for which all others would wait."""
        texts = [message["content"] for message in wanted.messages] or [wanted.prompt]
        characters = sum(map(len, texts))
        if len(texts) > self.context or characters > self.context * self._longest_token:
            raise ApiError(
                400,
                f"the prompt has {characters:,} characters in {len(texts):,} texts, and prompt and answer together may "
                f"have {self.context:,} tokens; shorten the prompt",
                param="messages" if wanted.messages else "prompt",
                code="context_length_exceeded",
            )

    @cached_property
    def _longest_token(self) -> int:
        """Most characters of a token."""
        return max(map(len, self.tokenizer.get_vocab()))


def _encode(prompts: Prompts, wanted: Wanted) -> list[int]:
    if not wanted.messages:
        return prompts.encode_text(wanted.prompt)
    *before, question = wanted.messages
    system = before.pop(0)["content"] if before and before[0]["role"] == "system" else None
    if before and before[0]["role"] == "system":
        raise UsageError(
            "the conversation begins with several system messages; send one that has all of their text"
        )
    if before and not prompts.accepts_history:
        raise UsageError(
            "this model was trained on single questions, and its prompts have no place for earlier messages; send the "
            "question alone"
        )
    return prompts.encode(question["content"], before, system=system)


def open_models(
    folder: str,
    others: Mapping[str, str],
    *,
    context: int | None = None,
    device: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> Models:
    """Load the models to serve.

    A model's prompts are those of the recipe in its folder. A folder without a recipe, such as one of PEFT's, gets the
    prompts of the first, and so does the base.

    Args:
        folder: folder of a run or of an adapter.
        others: folders of other adapters of the same base, by name.
        context: most tokens of a request; None: the model's positions, at most `DEFAULT_CONTEXT`.
        device: auto, cpu, cuda or cuda:N.
        any_base: see `open_adapters`.
        trust_remote_code: see `load_trained`.

    Raises:
        ModelError: as `open_adapters`.
        UsageError: a name is taken, or `context` is longer than the model's positions.
        DataError: the template of an adapter cannot be used.
    """
    opened = open_adapters(
        folder, others, device=device, any_base=any_base, trust_remote_code=trust_remote_code
    )
    trained = opened.trained
    positions = getattr(trained.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and (context or 0) > positions:
        raise UsageError(f"--context {context}: the model has {positions:,} positions; ask for no more")
    context = context or min(positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    names = opened.folders or {trained.recipe.name: trained.folder}
    served = {
        name: Served(name, name if opened.folders else None, _prompts(opened, name, path, trust_remote_code))
        for name, path in names.items()
    }
    if opened.folders:
        served.setdefault(BASE, Served(BASE, None, trained.prompts))
    for model in served.values():
        model.prompts.encode(
            "?"
        )  # an error of a template now, and its process before there are other threads
    adapters = opened.adapters if opened.folders else None
    return Models(trained.model, trained.tokenizer, adapters, served, context)


def _prompts(opened: NamedAdapters, name: str, folder: Path, trust_remote_code: bool) -> Prompts:
    """Return the prompts of the recipe in an adapter's folder, else those of the first adapter."""
    trained = opened.trained
    if folder == trained.folder or not (folder / "recipe.yaml").is_file():
        return trained.prompts
    recipe = recipe_of(folder, trust_remote_code=trust_remote_code)
    return Prompts(recipe.data, trained.tokenizer, shared_system(folder))
