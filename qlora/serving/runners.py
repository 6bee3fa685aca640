"""Computation of answers: several at once over a cache with slots, or one at a time with transformers' own cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria

from qlora.adapter.switch import Adapters
from qlora.objective.step import evaluation_mode
from qlora.serving.job import Job
from qlora.serving.slots import SlotModel

PROMPT_TOKENS = 512
"""most prompt tokens of one forward pass, padding included: answers in progress wait no longer than for these"""


class Runner(Protocol):
    """Computes the answers of the jobs in progress."""

    parallel: int
    """most jobs in progress"""
    device: torch.device

    def advance(self, jobs: Sequence[Job]) -> None:
        """Add at least one token to the prompt or the answer of each job. A job whose computation fails is ended."""


class Batched:
    """All jobs of an adapter share each forward pass; adapters take turns within a round.

    Args:
        model: the model with its cache.
        adapters: its adapters; None for a model that has none.
    """

    def __init__(self, model: SlotModel, adapters: Adapters | None) -> None:
        self.model, self.adapters = model, adapters
        self.parallel, self.device = model.slots, model.device

    def advance(self, jobs: Sequence[Job]) -> None:
        """Compute the next token of each job; or of new ones, the next part of the prompt."""
        self._assign(jobs)
        for adapter in dict.fromkeys(job.adapter for job in jobs):
            own = sorted((job for job in jobs if job.adapter == adapter), key=lambda job: job.slot or 0)
            if self.adapters is not None and self.adapters.active != adapter:
                self.adapters.activate(adapter)
            answering = [job for job in own if job.tokens]
            self._pass(_within_budget([job for job in own if not job.tokens]))
            self._pass([(job, job.tokens[-1:]) for job in answering])

    def _assign(self, jobs: Sequence[Job]) -> None:
        """Give new jobs a free slot."""
        taken = {job.slot for job in jobs}
        free = (slot for slot in range(self.parallel) if slot not in taken)
        for job in jobs:
            if job.slot is None:
                job.slot = next(free)

    def _pass(self, parts: Sequence[tuple[Job, Sequence[int]]]) -> None:
        """Run the next tokens of jobs together; if that fails, each alone, and end those that fail alone."""
        parts = [(job, tokens) for job, tokens in parts if not (job.done or job.left)]
        if not parts:
            return
        try:
            logits = self.model.forward(
                [job.slot or 0 for job, _ in parts],
                [tokens for _, tokens in parts],
                [job.cached for job, _ in parts],
            )
        except Exception as error:  # noqa: BLE001 - told to the client, and the server goes on
            if len(parts) == 1:
                parts[0][0].fail(error)
            else:
                # a place of the cache that is written twice gets the same values
                for part in parts:
                    self._pass([part])
            return
        for row, (job, tokens) in enumerate(parts):
            job.cached += len(tokens)
            if job.cached >= len(job.prompt):
                _take(job, logits[row])


def _within_budget(jobs: Sequence[Job]) -> list[tuple[Job, list[int]]]:
    """Return the next part of the prompts, as many as one pass takes; the prompts that waited longest come first."""
    parts: list[tuple[Job, list[int]]] = []
    longest = 0
    for job in sorted(jobs, key=lambda job: job.began or 0.0):
        tokens = job.prompt[job.cached : job.cached + PROMPT_TOKENS]
        longest = max(longest, len(tokens))
        if parts and longest * (len(parts) + 1) > PROMPT_TOKENS:
            break
        parts.append((job, tokens))
    return sorted(parts, key=lambda part: part[0].slot or 0)


def _take(job: Job, logits: Tensor) -> None:
    try:
        job.take(logits)
    except Exception as error:  # noqa: BLE001 - told to the client, and the server goes on
        job.fail(error)


class OneAtATime:
    """Answers one job after the other through transformers' `generate`, whatever the model keeps between tokens.

    Args:
        model: the model.
        tokenizer: supplies the padding token.
        adapters: the model's adapters; None for a model that has none.
    """

    parallel = 1

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, adapters: Adapters | None
    ) -> None:
        self.model, self.adapters = model, adapters
        self.device = next(model.parameters()).device
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @torch.no_grad()
    def advance(self, jobs: Sequence[Job]) -> None:
        """Compute the whole answer of each job."""
        for job in jobs:
            if self.adapters is not None:
                self.adapters.activate(job.adapter)
            try:
                self._answer(job)
            except Exception as error:  # noqa: BLE001 - told to the client, and the server goes on
                job.fail(error)

    def _answer(self, job: Job) -> None:
        ids = torch.tensor([job.prompt], device=self.device)
        with evaluation_mode(self.model):
            self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.settings.max_tokens,
                do_sample=False,  # the job draws
                temperature=None,
                repetition_penalty=1.0,  # the job applies it
                pad_token_id=self._pad,
                eos_token_id=sorted(job.settings.ends) or None,
                use_cache=True,
                logits_processor=LogitsProcessorList([_Chooses(job)]),
                stopping_criteria=[_Ends(job)],
            )


class _Chooses(LogitsProcessor):
    """Leaves the token that the job chooses as the only possible one."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._job.take(scores[0].float())
        return torch.full_like(scores, float("-inf")).index_fill(
            1, torch.tensor([token], device=scores.device), 0
        )


class _Ends(StoppingCriteria):
    """Ends `generate` with its job."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._job.done or self._job.left, device=input_ids.device)
