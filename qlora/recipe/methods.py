"""What a recipe must know of each adapter method; the methods themselves are in `qlora.adapter.methods`."""

from dataclasses import dataclass

LOW_RANK_KEYS = ("rank", "alpha", "dropout", "scaling", "init", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class MethodFacts:
    """One method, as far as a recipe's rules and a forecast's advice go."""

    summary: str
    """what is trained, in words; fields of the section `adapter` in braces"""
    frozen_base: bool = True
    """the base stays as it is, so it may be in NF4, and the result is an adapter; else the result is a whole model"""
    unused: tuple[str, ...] = ()
    """keys of the section `adapter` without effect"""


METHODS = {
    "lora": MethodFacts("LoRA of rank {rank} on {targets}"),
    "full": MethodFacts("all weights trained", frozen_base=False, unused=(*LOW_RANK_KEYS, "targets")),
    "bitfit": MethodFacts("biases of {targets}", unused=LOW_RANK_KEYS),
}
