"""Attention masks of packed rows for models that build theirs without position ids, so that documents see each other.

transformers separates the documents of a row in its masks where position ids restart. Some models do not hand their
position ids to it, but take masks that are made already, as their own generation does.
"""

from typing import Any

from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

MODEL_TYPES = ("gpt_oss", "xglm", "biogpt")
"""such models; the check of documents in a row confirms it for each run"""


def packed_arguments(model: Any, embedding: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments that keep the documents of packed rows apart.

    Args:
        model: the model.
        embedding: weight of its input embedding [V, H].
        position_ids: positions [B, T], which restart at 0 with each document.
    """
    arguments: dict[str, Any] = {"position_ids": position_ids}
    config = model.config.get_text_config()
    if config.model_type in MODEL_TYPES:
        shape = embedding.new_empty(*position_ids.shape, 0)
        arguments["attention_mask"] = create_masks_for_generate(config, shape, None, None, position_ids)
    return arguments
