"""Cells of the table: what is done with a tiny model of each type, and checked."""

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from benchmarks.architectures import tiny
from qlora import bundled
from qlora.adapter import save_adapter
from qlora.adapter.store import load_adapter
from qlora.data import Batches, load_dataset
from qlora.inference.generate import answer
from qlora.inference.load import load_trained
from qlora.memory.architecture import architecture
from qlora.memory.estimate import Estimate, estimate
from qlora.merging.merge import merge
from qlora.model.decoder_layer import FusedLayer
from qlora.model.load import load_base, load_tokenizer
from qlora.model.precision import percent
from qlora.model.prepare import build
from qlora.objective.checks import read_documents
from qlora.objective.step import accumulate, evaluate
from qlora.recipe import Recipe
from qlora.training.train import train as run_training

WORDS = ("red", "green", "blue", "seven", "lamps", "boxes", "order", "for", "Anna", "Ben", "please", "send")

EQUAL = 2e-4
"""largest relative difference of two numbers that are computed in different orders, in float32"""
EQUAL_EXPERTS = 5e-3
"""the same for a mixture of experts, whose router can turn a rounding into another choice"""
FORECAST = 0.01
"""largest relative difference of the forecast and the measured peak"""
MERGED = 0.005
"""largest relative change of the held-out loss by a merge, which rounds the weights to 16 bits"""
CLEAR = 0.1
"""smallest effect of an adapter on the logits, as a part of their spread"""
OFF = 0.03
"""largest difference of a merged model's logits, as a part of the adapter's effect on them"""


@dataclass
class Case:
    """A tiny base of one model type in a folder, and what the cells make of it."""

    model_type: str
    work: Path
    run: Path | None = None
    """folder of the finished run"""

    def write(self) -> None:
        """Write the base and its rows; a config that transformers cannot build raises its error."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny.config(self.model_type), dtype=torch.float32)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek V4's experts of each token, all zero without a checkpoint
                buffer.copy_((torch.arange(len(buffer))[:, None] + torch.arange(buffer.shape[1])) % 4)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(self.work / "base")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled.path("bundled/base") / file, self.work / "base")
        draw = random.Random(0)
        rows = [
            {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(4, 9))), "completion": " red seven lamps"}
            for _ in range(16)
        ]
        (self.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, **sections: Mapping[str, Any]) -> Recipe:
        """Return the recipe of the run, with changes by section."""
        settings: dict[str, Any] = {
            "base": {"model": str(self.work / "base"), "compute_dtype": "float32", "allow_unquantized": True},
            "adapter": {"rank": 8, "targets": "all-linear"},
            "data": {
                "source": str(self.work / "rows.jsonl"), "held_out": 4, "format": "prompt-completion",
                "max_length": 64,
            },
            "training": {
                "max_steps": 3, "micro_batch_size": 2, "global_batch_size": 4, "samples": 0, "device": "cpu",
                "activation_checkpointing": "none",
            },
            "optimizer": {"name": "adamw", "lr": 0.05},
            "tracking": {"wandb": {"mode": "disabled"}},
            "output": str(self.work / "run"),
        }  # fmt: skip
        for name, changes in sections.items():
            settings[name] = {**settings[name], **changes}
        return Recipe.from_dict(settings)

    @property
    def trained(self) -> Path:
        """Folder of the finished run. Its absence is an error of the cells' order."""
        assert self.run is not None
        return self.run

    @cached_property
    def estimated(self) -> Estimate:
        """The estimate of the recipe."""
        return estimate(self.recipe())

    @cached_property
    def tolerance(self) -> float:
        """Largest relative difference of two equal numbers."""
        config = tiny.config(self.model_type).to_dict()
        mixture = any("expert" in name and value for name, value in config.items())
        return EQUAL_EXPERTS if mixture else EQUAL


def estimated(case: Case) -> str:
    """Forecast the memory of the recipe from config.json."""
    return f"{case.estimated.needed_bytes:,} bytes"


def weights(case: Case) -> str:
    """Share of the linear weights in NF4, and what the others are."""
    precision = architecture(case.recipe(), cuda=False).precision
    return "; ".join([percent(precision.share), *precision.kept])


def passes(case: Case) -> str:
    """Say whether the decoder layers have our fused passes."""
    model = architecture(case.recipe(), cuda=False).model
    return "fused" if any(isinstance(module, FusedLayer) for module in model.modules()) else "transformers"


def train(case: Case) -> str:
    """Train LoRA on all linear layers over NF4 for three steps."""
    result = run_training(case.recipe(), terminal=False)
    assert result.loss_after is not None, "the run has no held-out loss"
    assert math.isfinite(result.loss_after), f"the held-out loss is {result.loss_after}"
    case.run = result.run
    return f"held-out loss {result.loss_after:.3f}"


def forecast(case: Case) -> str:
    """Compare the run's forecast and measured peak."""
    file = case.trained / "memory.json"
    if not file.exists():
        estimate(case.recipe())  # says why there is no forecast
    memory = json.loads(file.read_text())
    expected, found = (memory[name]["total_bytes"] for name in ("forecast", "measured"))
    off = expected / found - 1
    assert abs(off) <= FORECAST, f"forecast {expected:,} bytes, measured {found:,}: {off:+.1%}"
    return f"{off:+.2%}"


def packed(case: Case) -> str:
    """Compare the loss of packed rows with that of the same rows, each for itself."""
    losses = []
    for packing in (True, False):
        recipe = case.recipe(data={"packing": packing})
        dataset = load_dataset(recipe.data, load_tokenizer(recipe.base), 0)
        batches = Batches(
            dataset.train, micro_batch_size=2, global_batch_size=2, max_length=64, packing=packing,
            pad_id=dataset.pad_id, seed=0,
        )  # fmt: skip
        model, _ = build(recipe, "cpu")
        read_documents(model, recipe)
        steps = [batch for step in range(batches.steps_per_epoch) for batch in batches.step(step)]
        losses.append(float(evaluate(model, steps)[0].sum))
    return _equal(losses[0], losses[1], case.tolerance, "packed", "unpacked")


def checkpointed(case: Case) -> str:
    """Compare the gradients with and without activation checkpointing."""
    gradients = []
    for setting in ("full", "none"):
        recipe = case.recipe(training={"activation_checkpointing": setting})
        dataset = load_dataset(recipe.data, load_tokenizer(recipe.base), 0)
        batches = Batches(
            dataset.train, micro_batch_size=2, global_batch_size=4, max_length=64, packing=False,
            pad_id=dataset.pad_id, seed=0,
        )  # fmt: skip
        model, _ = build(recipe, "cpu")
        read_documents(model, recipe)
        model.train()
        accumulate(model, batches.step(0), seed=0, step=0)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, plain = gradients
    assert ours.keys() == plain.keys(), f"checkpointing changes what is trained: {ours.keys() ^ plain.keys()}"
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in plain.values()))
    apart = math.sqrt(sum(float((ours[name] - plain[name]).square().sum()) for name in plain))
    assert norm > 0, "no gradient"
    assert apart <= case.tolerance * norm, f"the gradients differ by {apart / norm:.1e} of their size"
    return f"gradients differ by {apart / norm:.0e}"


def adapter(case: Case) -> str:
    """Save the adapter that a run made, and load it over a new base."""
    trained = load_trained(case.trained, device="cpu")
    live = _logits(trained.model)
    save_adapter(trained.model, case.work / "saved")
    base = load_base(case.recipe().base, "cpu")
    effect = _apart(_logits(base), live)
    assert effect > CLEAR, f"the adapter changes the logits by {effect:.1e} of their spread only"
    again = _apart(_logits(load_adapter(base, case.work / "saved", any_base=True)), live)
    assert again <= 1e-3 * effect, (
        f"the loaded adapter's logits are off by {again / effect:.1e} of its effect"
    )
    return f"{again / effect:.0e} of its effect, {effect:.2f}"


def generate(case: Case) -> str:
    """Generate twelve tokens with a cache; each is the most likely one of a pass without a cache."""
    trained = load_trained(case.trained, device="cpu")
    prompt = trained.tokenizer("red seven lamps for Anna").input_ids
    answer(trained.model, trained.tokenizer, prompt, max_new_tokens=4)
    given = torch.tensor([prompt])
    with torch.no_grad():
        ids = trained.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, eos_token_id=2, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        logits = trained.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits[:, 2] = -math.inf  # the end token, which no forced answer has
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    spread = float(logits[logits.isfinite()].std())
    behind = float((logits.max(1).values - chosen).max()) / spread
    assert behind <= 0.05, f"with a cache it writes other tokens than without one ({behind:.2f} deviations)"
    return "as without a cache"


def merged(case: Case) -> str:
    """Merge into 16-bit weights, and load these with transformers alone."""
    to = case.work / "merged"
    record = merge(case.trained, to, onto="dequantized", max_tokens=200).as_json()
    live, after = (math.log(one["perplexity"]) for one in (record["live"], record["judged"][0]))
    change = abs(after / live - 1)
    assert change <= MERGED, f"the merge changes the held-out loss from {live:.4f} to {after:.4f}"
    model, report = AutoModelForCausalLM.from_pretrained(to, output_loading_info=True, dtype=torch.float32)
    problems = {problem: sorted(map(str, names)) for problem, names in report.items() if names}
    assert not problems, f"transformers reports {problems}"
    trained = load_trained(case.trained, device="cpu")
    live_logits = _logits(trained.model)
    effect = _apart(_logits(load_base(case.recipe().base, "cpu")), live_logits)
    off = _apart(_logits(model), live_logits)
    assert off <= OFF * effect, (
        f"the merged model's logits are off by {off:.0e}, the adapter's effect {effect:.0e}"
    )
    return f"off by {off:.0e}, effect {effect:.0e}"


CELLS: Mapping[str, Callable[[Case], str]] = {
    "estimate": estimated,
    "weights": weights,
    "passes": passes,
    "train": train,
    "forecast": forecast,
    "packed": packed,
    "checkpointed": checkpointed,
    "adapter": adapter,
    "generate": generate,
    "merged": merged,
}
"""cell -> what it does; returns a note, or raises an error"""

AFTER_TRAINING = ("forecast", "packed", "checkpointed", "adapter", "generate", "merged")
"""cells of a model that trains"""


@torch.no_grad()
def _logits(model: nn.Module | PreTrainedModel) -> Tensor:
    """Return the logits of 40 tokens in two rows, [40, V]."""
    ids = (torch.arange(40).view(2, 20) * 7 + 3) % tiny.VOCABULARY
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return logits.flatten(0, 1)


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the difference of logits [T, V] of the median token, relative to their spread.

    An undecided router can send a token to another expert after a rounding, which changes few tokens of many.
    """
    return float((one - other).square().mean(1).sqrt().median() / other.std())


def _equal(one: float, other: float, tolerance: float, name: str, its: str) -> str:
    apart = abs(one / other - 1)
    assert apart <= tolerance, f"loss {name} {one:.5f}, {its} {other:.5f}"
    return f"losses differ by {apart:.0e}"
