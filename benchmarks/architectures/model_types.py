"""Model types of the installed transformers: which are causal language models of text, and why the others are not."""

from collections.abc import Mapping

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

ENCODER = "an encoder, which also is a masked language model"
SEQ_TO_SEQ = "the decoder of an encoder-decoder model"
MULTIMODAL = "reads images or audio in addition to text"
DRAFTER = "a drafter, which reads the hidden states of another model"

BY_MAPPING: Mapping[str, str] = {
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ENCODER,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": SEQ_TO_SEQ,
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": SEQ_TO_SEQ,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": MULTIMODAL,
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": MULTIMODAL,
}
"""a mapping of transformers -> what its model types are; transformers lists them as causal language models too"""

BY_NAME: Mapping[str, str] = {
    "bert-generation": SEQ_TO_SEQ,
    "trocr": SEQ_TO_SEQ,
    "musicgen": MULTIMODAL,
    "musicgen_melody": MULTIMODAL,
    "moshi": MULTIMODAL,
    "xlnet": "a permutation language model, which predicts no next token without a target mapping",
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
}
"""model types that no mapping of transformers tells apart"""


def causal() -> list[str]:
    """Return the model types of all causal language models of text, in alphabetical order."""
    return [name for name in _all() if _why_not(name) is None]


def others() -> dict[str, str]:
    """Return the model types that transformers lists as causal language models and that are something else: why."""
    return {name: why for name in _all() if (why := _why_not(name)) is not None}


def class_name(model_type: str) -> str:
    """Return the name of the model's class."""
    return str(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _all() -> list[str]:
    return sorted(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def _why_not(name: str) -> str | None:
    mapped = (why for mapping, why in BY_MAPPING.items() if name in getattr(auto, mapping, ()))
    return BY_NAME.get(name) or next(mapped, None)
