"""What the settings of a recipe mean for each other: contradictions, and keys without effect.

A rule sees flat settings (`{"adapter.rank": 8, ...}`) and therefore works on checked recipes and, as far as
their values are usable, on broken ones: all problems of a file are shown at once.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from operator import eq
from typing import Any

from qlora.formats import FORMATS
from qlora.recipe.methods import METHODS
from qlora.recipe.problems import shorten
from qlora.recipe.sizes import parse_size

Settings = Mapping[str, Any]
Finding = tuple[str, str]

MAPPINGS = (
    "adapter.rank_pattern", "adapter.alpha_pattern", "data.columns", "training.activation_checkpointing",
)  # fmt: skip
"""The settings whose values are mappings, or may be."""

PLAIN_TEXT = {name for name, format in FORMATS.items() if format.kind == "text"}

LOCAL_FILE = re.compile(r"bundled/.*|.*\.(json|jsonl|ndjson|csv|tsv|parquet)(\.gz)?", re.DOTALL)
LOCAL_FOLDER = re.compile(r"bundled/.*|[./~].*", re.DOTALL)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"adapter": {"rank": 8}}` -> `{"adapter.rank": 8}`; mappings that are values stay whole."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in MAPPINGS:
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


# keys without effect, the setting that makes them so, and when it does
IDLE: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    *(
        (tuple(f"adapter.{key}" for key in facts.unused), "adapter.method", partial(eq, method))
        for method, facts in METHODS.items()
    ),
    (("base.double_quant", "base.block_size"), "base.quantization", lambda name: name == "none"),
    (("base.revision",), "base.model", lambda model: LOCAL_FOLDER.fullmatch(model) is not None),
    (("data.template", "data.train_on"), "data.format", lambda name: name in PLAIN_TEXT),
    (("data.split",), "data.source", lambda source: LOCAL_FILE.fullmatch(source) is not None),
    (
        ("training.eval_every", "training.samples", "training.sample_tokens"),
        "data.held_out",
        lambda rows: rows == 0,
    ),
    (("training.sample_tokens",), "training.samples", lambda samples: samples == 0),
    (("training.keep_checkpoints",), "training.save_every", lambda steps: steps is None),
    (("optimizer.eps",), "optimizer.name", lambda name: "lion" in name),
    (
        ("tracking.wandb.project", "tracking.wandb.entity", "tracking.wandb.name", "tracking.wandb.tags"),
        "tracking.wandb.mode",
        lambda mode: mode == "disabled",
    ),
]  # fmt: skip


def idle(settings: Settings) -> dict[str, str]:
    """The keys without effect in these settings -> the setting that makes them so."""
    return {
        key: reason
        for keys, reason, applies in reversed(IDLE)
        if reason in settings and applies(settings[reason])
        for key in keys
    }


def conflicts(settings: Settings, given: Settings) -> list[Finding]:
    """(key, what is wrong with it) for what contradicts itself or was given without effect.

    `settings` holds every usable value, defaults included; `given` what the recipe says itself.
    """
    return [
        *_idle(settings, given),
        *_method(settings, given),
        *_steps(settings, given),
        *_rows(settings),
        *_memory(settings),
        *_checkpointing(settings),
        *_columns(settings),
        *_patterns(settings),
    ]


def _idle(settings: Settings, given: Settings) -> Iterator[Finding]:
    for key, reason in idle(settings).items():
        if key in given:
            value = "null" if settings[reason] is None else shorten(str(settings[reason]))
            yield key, f"has no effect with {reason}: {value}; leave it out"


def _method(settings: Settings, given: Settings) -> Iterator[Finding]:
    if _frozen_base(settings):
        return
    method = settings["adapter.method"]
    if settings.get("base.quantization") == "nf4":
        key = "base.quantization" if "base.quantization" in given else "adapter.method"
        yield key, f"{method} needs base.quantization: none, since weights in NF4 cannot be trained"
    if settings.get("base.embedding") == "host":
        yield "base.embedding", f"is for a frozen base; with adapter.method: {method} leave it out"


def _frozen_base(settings: Settings) -> bool:
    """Whether the method leaves the base as it is; a method that is no method does no harm here."""
    facts = METHODS.get(settings.get("adapter.method", ""))
    return facts is None or facts.frozen_base


def _steps(settings: Settings, given: Settings) -> Iterator[Finding]:
    micro = settings.get("training.micro_batch_size")
    total = settings.get("training.global_batch_size")
    if micro and total and total % micro:
        key = "global" if "training.global_batch_size" in given else "micro"
        near = -(-total // micro) * micro
        text = f"global_batch_size ({total}) must be a multiple of micro_batch_size ({micro}), such as {near}"
        yield f"training.{key}_batch_size", text
    warmup = settings.get("optimizer.warmup_steps")
    steps = settings.get("training.max_steps")
    if warmup and steps and warmup >= steps:
        key = "optimizer.warmup_steps" if "optimizer.warmup_steps" in given else "training.max_steps"
        yield key, f"warmup_steps ({warmup}) must be below max_steps ({steps}), or lr is never reached"


def _memory(settings: Settings) -> Iterator[Finding]:
    memory = settings.get("training.memory")
    if isinstance(memory, str) and memory != "auto":
        try:
            parse_size(memory)
        except ValueError as error:
            yield "training.memory", f"{error}, or auto for what is free"


def _checkpointing(settings: Settings) -> Iterator[Finding]:
    recomputed = settings.get("training.activation_checkpointing")
    if recomputed is None or settings.get("training.memory") is not None:
        return  # unusable, or chosen by a plan
    layers = recomputed if isinstance(recomputed, Mapping) else {recomputed: 1}
    if settings.get("training.activation_offloading") and not layers.get("full"):
        yield (
            "training.activation_offloading",
            "is of the inputs of layers that are recomputed whole; leave it out, or write "
            "activation_checkpointing: full",
        )
    if layers.get("mlp") and not _frozen_base(settings):
        yield (
            "training.activation_checkpointing",
            "mlp is for frozen layers with adapters; with adapter.method: "
            f"{settings['adapter.method']} write full or none",
        )


def _rows(settings: Settings) -> Iterator[Finding]:
    held_out = settings.get("data.held_out")
    limit = settings.get("data.limit")
    if isinstance(held_out, int) and limit and held_out >= limit:
        yield "data.held_out", f"must be below data.limit ({limit}), or nothing is left to train on"
    if isinstance(held_out, str):
        if held_out == settings.get("data.source"):
            yield "data.held_out", "is data.source itself; hold out rows that are not trained on"
        elif set(held_out) <= set("0123456789+-._eE%: ") and any(map(str.isdigit, held_out)):
            text = f"{shorten(held_out)!r} is text here; write a share as 0.02, a number of rows as 100"
            yield "data.held_out", text


def _columns(settings: Settings) -> Iterator[Finding]:
    format = FORMATS.get(str(settings.get("data.format")))
    if format is None:
        return
    for name in settings.get("data.columns", ()):
        if name not in format.fields:
            near = get_close_matches(name, format.fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(format.fields)}"
            yield "data.columns", f"the {format.name} format has no field {shorten(name)!r}; {hint}"


def _patterns(settings: Settings) -> Iterator[Finding]:
    for key in ("adapter.targets", "adapter.rank_pattern", "adapter.alpha_pattern"):
        entries = settings.get(key, ())
        for entry in () if isinstance(entries, str) else entries:
            if reason := _not_a_pattern(entry):
                yield key, f"{shorten(entry)!r} is no regular expression: {reason}"


def _not_a_pattern(text: str) -> str:
    """Why text is no regular expression; empty if it is one."""
    try:
        with warnings.catch_warnings():  # re warns about what a later Python may read another way
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""
