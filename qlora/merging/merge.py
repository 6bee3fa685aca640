"""Merging, top to bottom: check everything, hear the live model, write and judge each choice, keep the best."""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from qlora.data import Batch, Prompts, held_out_batches, load_dataset
from qlora.errors import ModelError, OutOfMemoryError, SaveError, UsageError
from qlora.inference.load import find_trained, load_trained, recipe_of
from qlora.merging.compare import Judgement, Reference, choose, judge, reference, stored_bytes
from qlora.merging.write import MergeSource, Onto, write_merged
from qlora.model.load import load_base, load_tokenizer
from qlora.recipe import Recipe
from qlora.runtime.device import device_named
from qlora.storage.draft import check_absent, drafting, publish
from qlora.storage.folders import save_errors

GiB = 2**30

Progress = Callable[[str, int, int], object]
"""called with what is being done, how far it is, and of how much"""


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    folder: Path
    onto: Onto
    why: str
    weight_bytes: int
    tokens: int
    """supervised held-out tokens that it was judged by; 0 without a verdict"""
    live: Judgement | None
    judged: list[Judgement]

    def as_json(self) -> dict[str, Any]:
        """Plain values, as in the folder's merge.json."""
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
    """Write base + adapter as one model to the new folder `to`, and judge it on held-out text.

        >>> merged = merge("runs/mine", "models/mine")
        >>> merged.onto, merged.why

    Args:
        adapter: a run's or an adapter's folder.
        to: the folder to make. It appears when it is whole.
        onto: what the adapter is added to, see `qlora.merging.write`; auto judges every choice and keeps the best.
        data: a file of held-out text, laid out as the recipe's rows; None is the recipe's own held-out rows.
        original: hub id or folder of the 16-bit weights, where the recipe's base does not have them.
        max_tokens: supervised tokens to judge by, at most; 0 is no verdict.
        device: where to compute: auto, cpu or cuda.
        any_base: merge although the recipe's base or tokenizer is another than in training. What `original`
            names is taken at its word either way.
        trust_remote_code: let the base's own code run, where the recipe that came with the adapter asks for it.

    Raises:
        QloraError: something is missing, does not fit, or there is no room. Nothing is left behind.
    """
    to = Path(to)
    check_absent(to)
    folder = find_trained(Path(adapter))
    recipe = recipe_of(folder, trust_remote_code=trust_remote_code)
    plan = _prepare(folder, recipe, to, onto, data, original, max_tokens, device_named(device), any_base)
    with drafting(to) as drafts:
        live, heard = _hear(plan, progress) if plan.batches else (None, None)
        sizes, judged = {}, []
        for name, source in plan.sources.items():
            count = _counting(f"writing {name}", len(source.keys), progress)
            sizes[name] = write_merged(source, name, drafts / name, plan.prompts, count)
            if heard is not None:
                judged.append(_judge(plan, name, drafts / name, heard, sizes[name], progress))
                _remove_losers(drafts, judged)
        kept, why = _decide(onto, judged)
        tokens = sum(batch.supervised for batch in plan.batches)
        merged = Merged(to, kept, why, sizes[kept], tokens, live, judged)
        _record(plan, merged, drafts / kept)
        publish(drafts / kept, to)
    return merged


@dataclass(frozen=True)
class _Plan:
    """All that a merge needs, found to be there."""

    adapter: Path
    recipe: Recipe
    sources: dict[Onto, MergeSource]
    """the choices, in the order in which they are judged, and where each reads its weights"""
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
    """Everything that can go wrong without writing goes wrong here."""
    _check_mergeable(recipe, folder, onto, max_tokens)
    sources = _sources(recipe, folder, onto, original, device, any_base)
    _check_space(sources, to)
    tokenizer = load_tokenizer(recipe.base)
    batches = _held_out(recipe, tokenizer, data, max_tokens)
    if onto == "auto" and not batches:
        raise UsageError(
            "there is no held-out text to judge by: give --data FILE, or say what to merge onto with --onto"
        )
    return _Plan(folder, recipe, sources, batches, Prompts(recipe.data, tokenizer), device, any_base)


def _check_mergeable(recipe: Recipe, folder: Path, onto: str, max_tokens: int) -> None:
    if not recipe.adapter.facts.frozen_base:
        raise ModelError(
            f"{folder}: all weights were trained, so this is a whole model already: nothing to merge"
        )
    if recipe.base.init != "pretrained":
        raise ModelError(
            f"{folder}: its base was made from a seed (base.init={recipe.base.init}): it has no files to merge onto"
        )
    if onto == "auto" and max_tokens == 0:
        raise UsageError("--onto auto judges by held-out tokens, so --tokens must be above 0")


def _sources(
    recipe: Recipe, adapter: Path, onto: str, original: str | None, device: torch.device, any_base: bool
) -> dict[Onto, MergeSource]:
    """Where each choice reads its weights; what cannot be had is left out of auto, and an error if asked for."""
    base = recipe.base
    sources: dict[Onto, MergeSource] = {}
    if original is not None:
        elsewhere = base.model_copy(update={"model": original, "revision": None})
        sources["original"] = MergeSource(elsewhere, adapter, device, any_base=True)
        if "original" not in sources["original"].choices:
            raise ModelError(f"--original: {original} is in NF4 itself; the 16-bit weights are wanted")
    if not (onto == "original" and sources):  # the recipe's own base need not be there then
        source = MergeSource(base, adapter, device, any_base=any_base)
        sources = {**dict.fromkeys(source.choices, source), **sources}
    if onto == "auto":
        return sources
    if onto == "original" and onto not in sources:
        raise UsageError(
            f"the base {base.model} is an NF4 checkpoint, so its 16-bit weights are elsewhere: name them with "
            "--original MODEL, or merge --onto dequantized"
        )
    if onto == "dequantized" and onto not in sources:
        raise UsageError(f"the base {base.model} was not quantized in training: merge --onto original or nf4")
    return {name: where for name, where in sources.items() if name == onto}


def _check_space(sources: dict[Onto, MergeSource], to: Path) -> None:
    """Two choices stand on the disk at a time: the best so far and the one to be judged."""
    needed = sum(sorted(source.bytes(name) for name, source in sources.items())[-2:])
    existing = next(parent for parent in (to, *to.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise SaveError(
            f"{to}: merging takes {needed / GiB:.1f} GiB of disk there, and {free / GiB:.1f} GiB are free. "
            "A single choice (--onto) takes less than auto"
        )


def _held_out(recipe: Recipe, tokenizer: Any, data: str | None, max_tokens: int) -> list[Batch]:
    """The recipe's held-out rows, or the rows of `data`, up to `max_tokens` supervised tokens."""
    section = recipe.data
    if max_tokens == 0 or (data is None and section.held_out == 0):
        return []
    if data is None and isinstance(section.held_out, str):
        data = section.held_out  # the training rows need not be read
    if data is not None:
        section = section.model_copy(update={"source": data, "held_out": 0, "limit": None})
    dataset = load_dataset(section, tokenizer, recipe.training.seed)
    if data is not None:
        dataset = replace(dataset, held_out=dataset.train)
    chosen: list[Batch] = []
    tokens = 0
    for batch in held_out_batches(dataset, recipe):
        if tokens >= max_tokens:
            break
        chosen.append(batch)
        tokens += batch.supervised
    return chosen


def _hear(plan: _Plan, progress: Progress) -> tuple[Judgement, Reference]:
    """The live base + adapter: how it does itself, and what the merged models are compared with."""
    progress("hearing base + adapter", 0, 1)
    trained = load_trained(
        plan.adapter,
        device=plan.device.type,
        any_base=plan.any_base,
        trust_remote_code=plan.recipe.base.trust_remote_code,  # it has been consented to
    )
    heard = reference(trained.model, plan.batches)
    return judge("live", trained.model, heard, stored_bytes(trained.model)), heard


def _judge(
    plan: _Plan, name: Onto, folder: Path, heard: Reference, weight_bytes: int, progress: Progress
) -> Judgement:
    """A merged model read back from its files, on a device that has room for it, and judged."""
    progress(f"judging {name}", 0, 1)
    _free_memory()
    device = plan.device
    if device.type == "cuda" and weight_bytes > 0.8 * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    quantization = "nf4" if name == "nf4" else "none"
    changes = {"model": str(folder.absolute()), "revision": None, "quantization": quantization}
    try:
        return judge(
            name, load_base(plan.recipe.base.model_copy(update=changes), device), heard, weight_bytes
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the device has no room to judge {name}: use --device cpu, or --tokens 0 for no verdict"
        ) from error


def _decide(onto: Onto | Literal["auto"], judged: Sequence[Judgement]) -> tuple[Onto, str]:
    if onto != "auto":
        return onto, "as asked"
    best, why = choose(judged)
    return cast(Onto, best.name), why


def _record(plan: _Plan, merged: Merged, folder: Path) -> None:
    """What this model is and how it was judged, beside its weights."""
    base = plan.recipe.base
    origin = {"adapter": str(plan.adapter), "base": base.model, "revision": base.revision}
    record = json.dumps({**merged.as_json(), **origin}, indent=2) + "\n"
    with save_errors(folder):
        (folder / "merge.json").write_text(record, encoding="utf-8")


def _remove_losers(drafts: Path, judged: list[Judgement]) -> None:
    best, _ = choose(judged)
    for one in judged:
        if one is not best:
            shutil.rmtree(drafts / one.name, ignore_errors=True)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counting(what: str, total: int, progress: Progress) -> Callable[[], None]:
    """Reports one more of `total` done each time it is called."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    return count
