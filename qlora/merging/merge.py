"""Merging, top to bottom: check the input, run the live model, write and judge each choice, keep the best."""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from qlora.data import Batch, Prompts, held_out_batches, load_dataset
from qlora.data.prompt_files import shared_system
from qlora.data.sources import UnreadSource
from qlora.errors import DataError, ModelError, OutOfMemoryError, SaveError, UsageError
from qlora.inference.load import find_trained, load_trained, recipe_of, warn_of_other_rows
from qlora.merging.compare import Judgement, Reference, choose, judge, reference, stored_bytes
from qlora.merging.write import MergeSource, Onto, write_merged
from qlora.model.load import load_base
from qlora.model.tokens import tokenizer_of
from qlora.recipe import Recipe
from qlora.runtime.device import device_named
from qlora.runtime.out_of_memory import is_out_of_memory
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import save_errors

GiB = 2**30

Progress = Callable[[str, int, int], object]
"""called with the current action, the amount done and the total amount"""


@dataclass(frozen=True)
class Merged:
    """Result of a merge."""

    folder: Path
    onto: Onto
    why: str
    weight_bytes: int
    tokens: int
    """supervised held-out tokens used for the verdict; 0 without a verdict"""
    live: Judgement | None
    judged: list[Judgement]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as stored in the folder's merge.json."""
        return {
            "folder": str(self.folder),
            "onto": self.onto,
            "why": self.why,
            "weight_bytes": self.weight_bytes,
            "tokens": self.tokens,
            "live": None if self.live is None else self.live.as_json(),
            "judged": [one.as_json() for one in self.judged],
        }


def merge(
    adapter: str | Path,
    to: str | Path,
    *,
    onto: Onto | Literal["auto"] = "auto",
    data: str | None = None,
    original: str | None = None,
    max_tokens: int = 20_000,
    device: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Merged:
    """Write base + adapter as one model into the new folder `to`, and judge it on held-out text.

        >>> merged = merge("runs/mine", "models/mine")
        >>> merged.onto, merged.why

    Args:
        adapter: folder of a run or of an adapter.
        to: folder of the merged model; it must not exist, and appears only when it is complete.
        onto: weights to add the adapter to, see `qlora.merging.write`; auto judges every choice and keeps
            the best in 16 bits.
        data: file of held-out rows in the recipe's format; None uses the recipe's held-out rows.
        original: hub id or folder of the 16-bit weights, if the recipe's base is a 4-bit checkpoint.
        max_tokens: maximum number of supervised tokens to judge on; 0 skips the verdict.
        device: device for the computation: auto, cpu, cuda or cuda:N.
        any_base: merge even if the recipe's base or tokenizer is not the one from training. The weights in
            `original` are never compared with those from training.
        trust_remote_code: allow the base to run its own code, if the recipe stored with the adapter asks for it.

    Raises:
        QloraError: something is missing, does not fit, or there is too little disk space or memory. No file remains.
    """
    to = Path(to)
    check_absent(to)
    folder = find_trained(Path(adapter))
    recipe = recipe_of(folder, trust_remote_code=trust_remote_code)
    plan = _prepare(folder, recipe, to, onto, data, original, max_tokens, device_named(device), any_base)
    with drafting(to) as drafts:
        live, outputs = _run_live(plan, progress) if plan.batches else (None, None)
        sizes, judged = {}, []
        for name, source in plan.sources.items():
            count = _counting(f"writing {name}", len(source.keys), progress)
            sizes[name] = write_merged(source, name, drafts / name, plan.prompts, count)
            if outputs is not None:
                judged.append(_judge(plan, name, drafts / name, outputs, sizes[name], progress))
                _remove_losers(drafts, judged)
        kept, why = _decide(onto, judged)
        tokens = sum(batch.supervised for batch in plan.batches)
        merged = Merged(to, kept, why, sizes[kept], tokens, live, judged)
        _record(plan, merged, drafts / kept)
        publish(drafts / kept, to)
    return merged


@dataclass(frozen=True)
class _Plan:
    """Checked input of a merge."""

    adapter: Path
    recipe: Recipe
    sources: dict[Onto, MergeSource]
    """the choices, in the order of judging, each with the source of its weights"""
    batches: list[Batch]
    prompts: Prompts
    device: torch.device
    any_base: bool


def _prepare(
    folder: Path,
    recipe: Recipe,
    to: Path,
    onto: str,
    data: str | None,
    original: str | None,
    max_tokens: int,
    device: torch.device,
    any_base: bool,
) -> _Plan:
    """Check all input and make the plan, so that errors appear before anything is written."""
    _check_mergeable(recipe, folder, onto, max_tokens)
    sources = _sources(recipe, folder, onto, original, device, any_base)
    _check_space(sources, to)
    tokenizer = tokenizer_of(recipe)
    batches = _held_out(folder, recipe, tokenizer, data, max_tokens)
    if onto == "auto" and not batches:
        raise UsageError(
            "--onto auto compares the merged models on held-out rows, and there are none. Give a file with --data, or "
            "choose one with --onto original, dequantized or nf4"
        )
    return _Plan(
        folder,
        recipe,
        sources,
        batches,
        Prompts(recipe.data, tokenizer, shared_system(folder)),
        device,
        any_base,
    )


def _check_mergeable(recipe: Recipe, folder: Path, onto: str, max_tokens: int) -> None:
    """Raise an error if there is nothing to merge, or auto has no tokens to judge on."""
    if not recipe.adapter.facts.frozen_base:
        raise ModelError(
            f"{folder}: all weights were trained, so this is a complete model already; use it without a merge"
        )
    if recipe.base.init != "pretrained":
        raise ModelError(
            f"{folder}: its base was made from a seed (base.init={recipe.base.init}), so it has no files to merge "
            "onto. Use base and adapter without merging"
        )
    if onto == "auto" and max_tokens == 0:
        raise UsageError(
            "--onto auto compares the merged models on held-out tokens, so --tokens must be above 0; or choose one "
            "with --onto original, dequantized or nf4"
        )


def _sources(
    recipe: Recipe, adapter: Path, onto: str, original: str | None, device: torch.device, any_base: bool
) -> dict[Onto, MergeSource]:
    """Return the source of weights of each choice. An unavailable choice is left out of auto, else an error."""
    base = recipe.base
    sources: dict[Onto, MergeSource] = {}
    if original is not None:
        unquantized = base.model_copy(update={"model": original, "revision": None})
        sources["original"] = MergeSource(unquantized, adapter, device, any_base=True)
        if "original" not in sources["original"].choices:
            raise ModelError(f"--original: {original} is an NF4 checkpoint too; give the 16-bit weights")
    if not (onto == "original" and sources):  # then the recipe's own base is not needed
        source = MergeSource(base, adapter, device, any_base=any_base)
        sources = {**dict.fromkeys(source.choices, source), **sources}
    if onto == "auto":
        return sources
    if onto == "original" and onto not in sources:
        raise UsageError(
            f"the base {base.model} is an NF4 checkpoint, which has no 16-bit weights: give them with "
            "--original MODEL, or use --onto dequantized"
        )
    if onto == "nf4" and onto not in sources and source.stacked is not None:
        raise UsageError(
            f"the files of {base.model} hold several layers in one tensor, such as {source.stacked}, and NF4 has a "
            "tensor for each layer: use --onto original or --onto dequantized"
        )
    if onto == "nf4" and onto not in sources:
        raise UsageError(
            f"transformers has another class for the {source.replaced} of {base.model} in 4-bit models, so it could "
            "not read the merged files: use --onto original or --onto dequantized"
        )
    if onto == "dequantized" and onto not in sources:
        raise UsageError(
            f"the base {base.model} was not quantized in training: use --onto original or --onto nf4"
        )
    return {name: source for name, source in sources.items() if name == onto}


def _check_space(sources: dict[Onto, MergeSource], to: Path) -> None:
    """Raise SaveError if the disk has no room for two merged models at a time: the best so far and the next."""
    needed = sum(sorted(source.bytes(name) for name, source in sources.items())[-2:])
    existing = next(parent for parent in (to, *to.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SaveError(
            f"{to}: merging needs {needed / GiB:.1f} GiB of disk space there, and {free / GiB:.1f} GiB are free. "
            "Free some space, or use --onto original, dequantized or nf4, which need less than auto"
        )


def _held_out(folder: Path, recipe: Recipe, tokenizer: Any, data: str | None, max_tokens: int) -> list[Batch]:
    """Load the recipe's held-out rows, or the rows of `data`, up to about `max_tokens` supervised tokens."""
    section, key = recipe.data, "--data"
    if max_tokens == 0 or (data is None and section.held_out == 0):
        return []
    if data is None and isinstance(section.held_out, str):
        data, key = section.held_out, "data.held_out"  # the training rows need not be read
    if data is not None:
        section = section.parts[0].model_copy(update={"source": data, "held_out": 0, "limit": None})
    try:
        dataset = load_dataset(section, tokenizer, recipe.training.seed)
    except UnreadSource as error:
        if data is None:
            raise  # with the key of its own
        raise DataError(f"{key}: {error.reason}") from error
    if data is not None:
        dataset = replace(dataset, held_out=dataset.train)
    else:
        warn_of_other_rows(folder, recipe, dataset)
    chosen: list[Batch] = []
    tokens = 0
    for batch in held_out_batches(dataset, recipe):
        if tokens >= max_tokens:
            break
        chosen.append(batch)
        tokens += batch.supervised
    return chosen


def _run_live(plan: _Plan, progress: Progress) -> tuple[Judgement, Reference]:
    """Run the live base + adapter; return its metrics, and its outputs to compare the merged models with."""
    progress("running base + adapter", 0, 1)
    trained = load_trained(
        plan.adapter,
        device=str(plan.device),
        any_base=plan.any_base,
        trust_remote_code=plan.recipe.base.trust_remote_code,  # checked by recipe_of
    )
    outputs = reference(trained.model, plan.batches)
    return judge("live", trained.model, outputs, stored_bytes(trained.model)), outputs


def _judge(
    plan: _Plan, name: Onto, folder: Path, outputs: Reference, weight_bytes: int, progress: Progress
) -> Judgement:
    """Load a merged model from its files and judge it, on the CPU if the GPU has too little memory."""
    progress(f"comparing {name}", 0, 1)
    _free_memory()
    device = plan.device
    if device.type == "cuda" and weight_bytes > 0.8 * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    quantization = "nf4" if name == "nf4" else "none"
    changes = {"model": str(folder.absolute()), "revision": None, "quantization": quantization}
    try:
        return judge(
            name, load_base(plan.recipe.base.model_copy(update=changes), device), outputs, weight_bytes
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"the device has too little memory to compare the merged model ({name}) with base + adapter: use "
            f"--device cpu, or skip the comparison with --onto {name} --tokens 0"
        ) from error


def _decide(onto: Onto | Literal["auto"], judged: Sequence[Judgement]) -> tuple[Onto, str]:
    if onto != "auto":
        return onto, "as asked"
    best, why = choose(judged)
    return cast(Onto, best.name), why


def _record(plan: _Plan, merged: Merged, folder: Path) -> None:
    """Write merge.json, with the verdict and the model's origin, next to the weights."""
    base = plan.recipe.base
    origin = {"adapter": str(plan.adapter), "base": base.model, "revision": base.revision}
    record = json.dumps({**merged.as_json(), **origin}, indent=2) + "\n"
    with save_errors(folder):
        (folder / "merge.json").write_text(record, encoding="utf-8")


def _remove_losers(drafts: Path, judged: list[Judgement]) -> None:
    """Remove the drafts of all judged choices except the best."""
    best, _ = choose(judged)
    for judgement in judged:
        if judgement is not best:
            shutil.rmtree(drafts / judgement.name, ignore_errors=True)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counting(what: str, total: int, progress: Progress) -> Callable[[], None]:
    """Return a function that reports one more of `total` as done each time it is called."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    return count
