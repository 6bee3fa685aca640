"""One cell: a training through the package's own session and step, then losses, answers, scores and spectra."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods.adapter_layers import AdapterLayers
from benchmarks.methods.base import weights_folder
from benchmarks.methods.cell import Cell, Setting
from benchmarks.methods.e2e import E2E
from benchmarks.methods.generation import greedy
from benchmarks.methods.prefix_tuning import PrefixLM, PrefixTuning, prefix_cache
from benchmarks.methods.scores import scores
from qlora.adapter.adapted_linear import AdaptedLinear, trainable_parameters
from qlora.adapter.algebra.spectrum import Spectrum
from qlora.adapter.methods import Course, Method
from qlora.data import Prompts, held_out_batches
from qlora.errors import DivergedError, QloraError
from qlora.model.prepare import build_optimizer
from qlora.objective.step import evaluate
from qlora.recipe import Recipe
from qlora.runtime.distributed import DataParallel
from qlora.training.prepare import prepare
from qlora.training.session import Session
from qlora.training.train import take_step

RIVALS: dict[str, Method] = {method.name: method for method in (AdapterLayers(), PrefixTuning())}
"""methods that exist in this benchmark only"""


@dataclass(frozen=True)
class Size:
    """Amounts of data of a cell."""

    rows: int
    """training rows, each used once"""
    held_out: int
    answers: int
    """test MRs that are answered and scored"""
    tokens: int
    """longest answer"""


SIZES = {"full": Size(1024, 200, 100, 64), "tiny": Size(24, 6, 3, 8)}

COMMON: Mapping[str, Any] = {
    "data.source": "e2e",
    "data.format": "prompt-completion",
    "data.max_length": 256,
    "training.global_batch_size": 16,
    "training.micro_batch_size": 16,
    "training.activation_checkpointing": "none",
    "training.max_grad_norm": 1.0,
    "training.device": "cpu",
    "optimizer.name": "adamw",
    "optimizer.schedule": "cosine",
    "base.quantization": "none",
}
"""recipe keys of every cell"""


class Losses:
    """Takes the place of a run's tracker and keeps the training losses."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.tokens = 0

    def step(self, record: Mapping[str, Any]) -> None:
        """Keep the loss of one step."""
        self.values.append(record["loss"])
        self.tokens += record["tokens"]


def recipe_of(cell: Cell, base: Path, held_out: Path) -> Recipe:
    """Return the recipe of a cell, for the base in folder `base`. Raises RecipeError if the package refuses it."""
    setting, size = cell.setting, SIZES[cell.size]
    keys = dict(COMMON) | {
        "base.model": str(base),
        "data.held_out": str(held_out),
        "training.seed": cell.seed,
    }
    keys["adapter.method"] = setting.method
    if setting.method in RIVALS:
        keys["adapter.method"] = (
            "full"  # only to load an unquantized base; `session_of` puts the rival's modules in
        )
    elif setting.method == "none":
        keys |= {"adapter.method": "lora", "adapter.rank": 1}  # not trained: B stays zero
    keys |= dict(setting.keys)
    keys["training.micro_batch_size"] = min(
        keys["training.micro_batch_size"], keys["training.global_batch_size"]
    )
    steps = math.ceil(size.rows / keys["training.global_batch_size"])
    keys["optimizer.warmup_steps"] = steps // 10
    return Recipe.from_dict(nested(keys), "cell")


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return names such as adapter.budget.every as nested dictionaries."""
    recipe: dict[str, Any] = {}
    for name, value in keys.items():
        *sections, key = name.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return recipe


def session_of(cell: Cell, data: E2E, cache: Path, *, watch_all: bool = False) -> Session:
    """Prepare the training of a cell: data, base, method, optimizer."""
    size = SIZES[cell.size]
    base = weights_folder(cache, cell.setting.weights)
    recipe = recipe_of(cell, base, held_out_file(cache, data, size.held_out))
    rows = data.training_rows(cell.seed, size.rows)
    session = prepare(recipe, DataParallel.of(recipe), rows=rows, watch_all=watch_all)
    if (rival := RIVALS.get(cell.setting.method)) is None:
        return session
    model = rival.apply(session.model, recipe.adapter, cell.seed)
    optimizer = build_optimizer(model, recipe)
    objective = PrefixLM() if isinstance(rival, PrefixTuning) else session.objective
    memory = session.memory.with_watch(model, optimizer, Course(), every_step=watch_all)
    return replace(session, model=model, optimizer=optimizer, objective=objective, memory=memory)


def held_out_file(cache: Path, data: E2E, count: int) -> Path:
    """Return the file of the held-out rows, written at its first use."""
    file = cache / f"held-out-{count}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in data.held_out_rows(count))
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


def run(cell: Cell, data: E2E, cache: Path) -> dict[str, Any]:
    """Train and judge one cell; return all that its line in the ledger holds except the machine."""
    began, cpu_began = time.perf_counter(), time.process_time()
    session = session_of(cell, data, cache)
    before = dense_weights(session.model)
    losses, failed, trained = Losses(), None, trained_parameters(session.model)
    loss_before = held_out_loss(session)
    training = time.perf_counter()
    try:
        for step in range(session.total_steps if cell.setting.method != "none" else 0):
            take_step(session, step, losses)  # type: ignore[arg-type]
    except DivergedError as error:
        failed = str(error)
    training = time.perf_counter() - training
    result: dict[str, Any] = {
        **cell.as_json(),
        "trainable": trained,
        "trainable_end": trained_parameters(session.model),
        "base_parameters": base_parameters(session.model),
        "steps": len(losses.values),
        "tokens": losses.tokens,
        "loss_before": loss_before,
        "loss_after": None if failed else held_out_loss(session),
        "train_loss": fmean(losses.values[-8:]) if losses.values else None,
        "failed": failed,
        "dtype": str(session.model.get_input_embeddings().weight.dtype).removeprefix("torch."),  # type: ignore[operator]
    }
    if cell.setting.method == "none":
        result["trainable"] = result["trainable_end"] = 0
    else:
        result["memory_bytes"] = (session.memory.watch.measured() or {}).get("total_bytes")  # type: ignore[union-attr]
    if not failed:
        result |= spectrum(before, dense_weights(session.model)) if losses.values else {}
        result |= judged(session, data, cell)
    if outcome := session.course.outcome():
        result["outcome"] = outcome
    result["training_seconds"] = round(training, 2)
    result["seconds"] = round(time.perf_counter() - began, 2)
    result["cpu_seconds"] = round(time.process_time() - cpu_began, 2)
    return result


def held_out_loss(session: Session) -> float:
    """Return the mean loss in nats per supervised token of the held-out rows."""
    total, weight = evaluate(
        session.model, held_out_batches(session.dataset, session.recipe), session.objective
    )
    return total.sum.item() / weight


def answers(session: Session, mrs: list[str], tokens: int) -> list[str]:
    """Answer each MR greedily."""
    prompts = Prompts(session.recipe.data, session.tokenizer)
    ids = greedy(
        session.model,
        [prompts.encode(mr) for mr in mrs],
        set(prompts.stop_ids),
        tokens,
        filled=(lambda rows: prefix_cache(session.model, rows)) if hasattr(session.model, "prefix") else None,
    )
    return [session.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]


def judged(session: Session, data: E2E, cell: Cell) -> dict[str, Any]:
    """Return scores of the answers to the test sample, and the first three answers."""
    size = SIZES[cell.size]
    sample = data.test_sample(size.answers)
    texts = answers(session, list(sample), size.tokens)
    return {**scores(texts, list(sample.values())), "answers": texts[:3]}


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight [out, in] that each trained linear of the decoder layers has in effect, in fp32."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            if module.changes_weight:
                weights[name] = module.merged_weight().detach().float().clone()
        elif isinstance(module, nn.Linear) and ".layers." in f".{name}" and module.weight.requires_grad:
            weights[name] = module.weight.detach().float().clone()
    return weights


def spectrum(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return medians over the layers of the effective rank, 90% and 99% rank and relative norm of the change."""
    found = []
    for name, weight in after.items():
        values = torch.linalg.svdvals((weight - before[name]).double()).tolist()
        # Values below the rounding error of the fp32 difference are noise
        floor = 1e-7 * float(before[name].norm())
        kept = [value for value in values if value > floor]
        found.append(Spectrum(len(kept), kept, float(before[name].norm())))
    learned = [layer for layer in found if layer.singular_values]
    if not learned:
        return {}
    return {
        "effective_rank": median(layer.effective_rank for layer in learned),
        "rank_90": median(layer.rank_for(0.9) for layer in learned),
        "rank_99": median(layer.rank_for(0.99) for layer in learned),
        "relative_norm": median(layer.relative_norm or 0.0 for layer in learned),
    }


def trained_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters; AdaLoRA has fewer at the end than at the start."""
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


def base_parameters(model: nn.Module) -> int:
    """Return the parameters of the base, counted from its configuration, the tied head once."""
    config: Any = model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return int(config.vocab_size * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width)


@cache
def trains(setting: Setting) -> bool:
    """Return True if this version of the package, or this benchmark, accepts the setting."""
    if setting.method in (*RIVALS, "none"):
        return True
    try:
        recipe_of(Cell(setting, 0), Path("base"), Path("held-out.jsonl"))
    except QloraError:
        return False
    return True
