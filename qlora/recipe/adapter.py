"""The section `adapter` of a recipe: the method and its settings, and what is trained beside the adapter."""

from typing import Annotated, Literal

from pydantic import Field

from qlora.recipe.methods import BROUGHT_KEYS, METHODS, MethodFacts, summary_of
from qlora.recipe.rank_budget import RankBudget
from qlora.recipe.section import Count, Decay, Factor, Section, Targets, Text


class Adapter(Section):
    """The trained parameters: low-rank matrices or biases of a frozen model, or the whole model."""

    method: Literal["lora", "dora", "adalora", "vera", "full", "bitfit"] = "lora"
    """lora, dora, adalora, vera: low-rank updates (see Methods); full: all weights; bitfit: biases only."""
    start_from: Annotated[Text | None, Field(alias="from")] = None
    """Run or adapter folder to continue, of qlora or PEFT: its layers, ranks and numbers; null: a new adapter."""
    rank: Count = 8
    """Rank of the update B·A (LoRA, section 7.2: 8 is typically enough; QLoRA, appendix B.2: 64)."""
    alpha: Factor | None = None
    """Numerator of `scaling` (LoRA, section 4.1); null: equal to `rank`."""
    dropout: Decay = 0.0
    """Dropout probability of the input of A (QLoRA, appendix B.2: 0.1 up to 13B, 0.05 above)."""
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)", "alpha"] = "alpha/rank"
    """Factor of B·A·x: alpha/rank (LoRA), alpha/sqrt(rank) (rsLoRA, stable at high ranks), or alpha for every rank."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq"] = "kaiming"
    """Random A and zero B; or A and B from the weights: pissa (arXiv:2404.02948), loftq (NF4; arXiv:2310.08659)."""
    lr_ratio: Factor = 1.0
    """Learning rate of B over that of A, `optimizer.lr` (LoRA+, arXiv:2402.12354, section 5: about 16)."""
    expert_rank: Count | None = None
    """Rank of each expert of a mixture; null: `rank` over the experts that a token passes through, at least 1."""
    targets: Targets = "all-linear"
    """Layers: all-linear (QLoRA, section 4), attention (q, k, v, o), experts, or suffixes and regular expressions."""
    rank_pattern: dict[Text, Count] = {}
    """Rank of the modules whose name matches the suffix or regular expression; the first match applies."""
    alpha_pattern: dict[Text, Factor] = {}
    """Alpha of the modules whose name matches the suffix or regular expression; the first match applies."""
    train_tokens: Literal["new"] | list[Text] = []
    """Tokens whose rows of embedding and head are trained too; new: control tokens of the template without a token."""
    train_modules: list[Text] = []
    """Modules trained as a whole, such as norm, lm_head or score: suffixes and regular expressions of their names."""
    budget: RankBudget = RankBudget()
    """AdaLoRA's budget of ranks."""

    @property
    def initial_rank(self) -> int:
        """Rank of the layers at the start: `rank`, and with AdaLoRA the first rank of its budget."""
        if "budget.initial_rank" in self.unused:
            return self.rank
        return self.budget.initial_rank or -(-3 * self.rank // 2)

    def budget_at(self, rank: int) -> RankBudget:
        """Return the budget with a given `initial_rank` in the same proportion to another rank."""
        first = self.budget.initial_rank
        return self.budget.model_copy(update={"initial_rank": first and -(-first * rank // self.rank)})

    @property
    def resolved_alpha(self) -> float:
        """`alpha`, or `rank` if it is null."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def facts(self) -> MethodFacts:
        """Facts about the method that rules and reports need."""
        return METHODS[self.method]

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of this section without effect: those that the method lacks, or that a continued adapter brings."""
        return self.facts.unused if self.start_from is None else (*self.facts.unused, *BROUGHT_KEYS)

    @property
    def summary(self) -> str:
        """Short description of the trained parameters, for reports."""
        settings = {"rank": self.rank, "targets": self.targets, "folder": self.start_from}
        return summary_of(self.facts, settings, self.train_tokens, self.train_modules)
