"""Computes rates, spreads and the ratios of paired rounds from the contenders' answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.speed.contenders import OURS, Contender
from benchmarks.speed.fairness import problems
from benchmarks.speed.flops import step_flops
from benchmarks.speed.job import Answer
from benchmarks.speed.presets import Shape
from benchmarks.speed.rounds import Comparison


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of several measurements."""

    least: float
    middle: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize at least one value."""
        return cls(min(values), median(values), max(values))


@dataclass(frozen=True)
class Score:
    """Results of one contender. Rates are tokens per second; only `positions` includes padding."""

    contender: Contender
    rates: list[float]
    """one per round: the median over its timed steps"""
    tokens: Spread
    supervised: float
    positions: float
    """tokens computed by the model, padding included"""
    seconds: Spread
    """seconds of a step, over all timed steps of all rounds"""
    processor: list[float]
    """processor seconds of a step, one per round: the median over its timed steps; empty if they were not measured"""
    memory: list[int]
    """peak bytes of the timed steps, one per round: on a CPU resident above imports, on CUDA allocated"""
    highest_memory: int
    """peak bytes of the whole process, loading and compiling included"""
    needed_share: float
    """share of the measured matrix-product rate, counting the operations that a step needs"""
    performed_share: float
    """the same share, counting recomputation too"""
    import_seconds: float
    load_seconds: float
    first_step_seconds: float


@dataclass(frozen=True)
class Ratio:
    """Ratio of one form of qlora to one peer, per round: above 1 means more tokens per second, or more memory."""

    ours: str
    peer: str
    speed: Spread
    memory: Spread
    processor: Spread | None
    """the peer's processor time divided by that of qlora; None if it was not measured"""


def good_answers(comparison: Comparison) -> dict[str, list[Answer]]:
    """Return the answers of the contenders without a problem in any round."""
    wrong = problems(comparison.answers, comparison.prepared.dtype)
    return {name: given for name, given in comparison.answers.items() if name not in wrong}


def scores(comparison: Comparison) -> list[Score]:
    """Return the score of every contender without a problem, in the order of the comparison."""
    good = good_answers(comparison)
    return [_score(comparison, c, good[c.name]) for c in comparison.contenders if c.name in good]


def ratios(results: Sequence[Score]) -> list[Ratio]:
    """Return the ratios of every form of qlora to every peer."""
    ours = [score for score in results if score.contender.program == OURS]
    peers = [score for score in results if score.contender.program != OURS]
    return [
        Ratio(
            ours=mine.contender.name,
            peer=peer.contender.name,
            speed=Spread.of([a / b for a, b in zip(mine.rates, peer.rates, strict=True)]),
            memory=Spread.of([a / b for a, b in zip(mine.memory, peer.memory, strict=True)]),
            processor=Spread.of([b / a for a, b in zip(mine.processor, peer.processor, strict=True)])
            if mine.processor and peer.processor
            else None,
        )
        for peer in peers
        for mine in ours
    ]


def rate(answer: Answer, tokens: Sequence[int], warmup: int) -> float:
    """Return the tokens per second of one process: the median over its timed steps."""
    timed = list(zip(tokens, answer.seconds, strict=True))[warmup:]
    return median(count / seconds for count, seconds in timed)


def training_memory(answer: Answer, device: str) -> int:
    """Return the peak bytes of the timed steps: allocated on CUDA; on a CPU, resident minus those after imports."""
    if device == "cuda":
        return answer.memory["train_allocated"]
    return answer.memory["train"] - answer.memory["imports"]


def highest_memory(answer: Answer, device: str) -> int:
    """Return the peak bytes of the whole process, counted as in `training_memory`."""
    phases = ("load", "warmup", "train")
    if device == "cuda":
        return max(answer.memory[f"{phase}_allocated"] for phase in phases)
    return max(answer.memory[phase] for phase in phases) - answer.memory["imports"]


def _score(comparison: Comparison, contender: Contender, answers: list[Answer]) -> Score:
    prepared, setting, warmup = comparison.prepared, comparison.setting, comparison.warmup
    rates = [rate(answer, prepared.tokens, warmup) for answer in answers]
    middle = median(rates)
    tokens = sum(prepared.tokens)
    shape = Shape.of(setting.preset.config)
    flops = [
        step_flops(shape, setting.rank, lengths, supervised, contender.recomputed)
        for lengths, supervised in zip(prepared.lengths, prepared.supervised, strict=True)
    ]
    # Each round is divided by the machine's rate in the same round, which cancels slow phases of the machine
    shares = [
        contender_rate / tokens / product_rate
        for contender_rate, product_rate in zip(rates, comparison.product_rates, strict=True)
    ]
    return Score(
        contender=contender,
        rates=rates,
        tokens=Spread.of(rates),
        supervised=middle * sum(prepared.supervised) / tokens,
        positions=middle * answers[0].positions / tokens,
        seconds=Spread.of([seconds for answer in answers for seconds in answer.seconds[warmup:]]),
        processor=[
            median(answer.processor_seconds[warmup:])
            for answer in answers
            if len(answer.processor_seconds) > warmup and prepared.device == "cpu"
        ],
        memory=[training_memory(answer, prepared.device) for answer in answers],
        highest_memory=max(highest_memory(answer, prepared.device) for answer in answers),
        needed_share=median(shares) * sum(step.needed for step in flops),
        performed_share=median(shares) * sum(step.performed for step in flops),
        import_seconds=median(answer.import_seconds for answer in answers),
        load_seconds=median(answer.load_seconds for answer in answers),
        first_step_seconds=max(answer.seconds[0] for answer in answers),
    )
