"""Rules between the settings of a recipe: contradictions and keys without effect.

A rule reads flat settings (`{"adapter.rank": 8, ...}`), so it works on valid recipes and on the usable values of
broken ones: all problems of a file are reported at once.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from operator import eq
from typing import Any

from qlora.formats import FORMATS
from qlora.recipe.methods import BROUGHT_KEYS, BUDGET_KEYS, METHODS
from qlora.recipe.problems import shorten
from qlora.recipe.sizes import parse_size
from qlora.recipe.source_names import is_local

Settings = Mapping[str, Any]
KeyProblem = tuple[str, str]

MAPPINGS = (
    "adapter.rank_pattern", "adapter.alpha_pattern", "data.columns", "data.template_options",
    "training.activation_checkpointing",
)  # fmt: skip
"""settings whose value is or can be a mapping"""

ALTERNATIVES = (("data.source", "data.sources"),)
"""settings of which a recipe has only one; an override of one replaces the other of the file"""

PLAIN_TEXT = {name for name, format in FORMATS.items() if format.kind == "text"}

LOCAL_FOLDER = re.compile(r"bundled/.*|[./~].*", re.DOTALL)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: `{"adapter": {"rank": 8}}` -> `{"adapter.rank": 8}`; values in `MAPPINGS` stay whole."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in MAPPINGS:
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


IDLE: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    *(
        (tuple(f"adapter.{key}" for key in facts.unused), "adapter.method", partial(eq, method))
        for method, facts in METHODS.items()
    ),
    (tuple(f"adapter.{key}" for key in BROUGHT_KEYS), "adapter.from", lambda folder: folder is not None),
    (("base.double_quant", "base.block_size"), "base.quantization", lambda name: name == "none"),
    (("base.revision",), "base.model", lambda model: LOCAL_FOLDER.fullmatch(model) is not None),
    (
        ("data.template", "data.template_options", "data.system", "data.system_as", "data.examples", "data.train_on"),
        "data.format",
        lambda name: name in PLAIN_TEXT,
    ),
    (("data.split",), "data.source", lambda source: source is not None and is_local(source)),
    (
        ("training.eval_every", "training.samples", "training.sample_tokens", "training.patience", "training.result",
         "training.best_by"),
        "data.held_out",
        lambda rows: rows == 0,
    ),
    (("data.examples",), "data.train_on", lambda tokens: tokens == "all"),
    (("training.sample_tokens",), "training.samples", lambda samples: samples == 0),
    (("training.keep_checkpoints",), "training.save_every", lambda steps: steps is None),
    (("optimizer.eps",), "optimizer.name", lambda name: "lion" in name),
    (
        ("tracking.wandb.project", "tracking.wandb.entity", "tracking.wandb.name", "tracking.wandb.tags"),
        "tracking.wandb.mode",
        lambda mode: mode == "disabled",
    ),
]  # fmt: skip
"""(keys without effect, the setting that disables them, the test of its value)"""


OF_SOURCES = ("data.format", "data.source")
"""settings that each of several sources can have for itself"""


def keys_without_effect(settings: Settings) -> dict[str, str]:
    """Return the keys without effect in these settings, each with the setting that disables it."""
    return {
        key: cause
        for keys, cause, applies in reversed(IDLE)
        if cause in settings
        and applies(settings[cause])
        and not (settings.get("data.sources") and cause in OF_SOURCES)
        for key in keys
    }


def conflicts(settings: Settings, given: Settings) -> list[KeyProblem]:
    """Return (key, problem) for settings that contradict each other and for written keys without effect.

    Args:
        settings: all usable values, with the defaults.
        given: the values that the recipe sets itself.
    """
    return [
        *_idle(settings, given),
        *_method(settings, given),
        *_start(settings),
        *_scaling(settings),
        *_init(settings),
        *_steps(settings, given),
        *_sources(settings),
        *_rows(settings),
        *_memory(settings),
        *_checkpointing(settings),
        *_columns(settings),
        *_raw_pairs(settings),
        *_patterns(settings),
        *_budget(settings),
        *_evaluations(settings),
        *_best_by(settings, given),
    ]


def _idle(settings: Settings, given: Settings) -> Iterator[KeyProblem]:
    for key, cause in keys_without_effect(settings).items():
        if given.get(key) is not None:  # null unsets a key
            value = "null" if settings[cause] is None else shorten(str(settings[cause]))
            yield key, f"has no effect with {cause}: {value}; leave it out"


def _method(settings: Settings, given: Settings) -> Iterator[KeyProblem]:
    if _frozen_base(settings):
        return
    method = settings["adapter.method"]
    if settings.get("base.quantization") == "nf4":
        key = "base.quantization" if "base.quantization" in given else "adapter.method"
        yield key, f"{method} needs base.quantization: none, because NF4 weights cannot be trained"
    if settings.get("base.embedding") == "host":
        yield "base.embedding", f"host needs a frozen base; with adapter.method: {method}, leave it out"


def _start(settings: Settings) -> Iterator[KeyProblem]:
    folder, method = settings.get("adapter.from"), settings.get("adapter.method", "")
    facts = METHODS.get(method)
    if folder is None or facts is None or facts.continued is not None or "from" in facts.unused:
        return
    able = ", ".join(name for name, facts in METHODS.items() if facts.continued is not None)
    yield "adapter.from", f"is defined for adapter.method: {able}; {method} cannot continue an adapter"


def _scaling(settings: Settings) -> Iterator[KeyProblem]:
    if settings.get("adapter.scaling") == "alpha" and settings.get("adapter.alpha", 1) is None:
        yield "adapter.scaling", "alpha needs the factor itself in adapter.alpha, such as 1; write both"


def _init(settings: Settings) -> Iterator[KeyProblem]:
    init, method = settings.get("adapter.init"), settings.get("adapter.method", "")
    facts = METHODS.get(method)
    if init not in ("pissa", "loftq") or facts is None or "init" in facts.unused:
        return
    if not facts.starts_from_weights:
        yield "adapter.init", f"{init} is not defined for adapter.method: {method}; use another init"
    elif init == "loftq" and settings.get("base.quantization") == "none":
        yield "adapter.init", "loftq corrects the error of NF4, so it needs base.quantization: nf4"


def _frozen_base(settings: Settings) -> bool:
    """Return True if the method leaves the base unchanged, or is unknown, which the schema reports."""
    facts = METHODS.get(settings.get("adapter.method", ""))
    return facts is None or facts.frozen_base


def _steps(settings: Settings, given: Settings) -> Iterator[KeyProblem]:
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
        yield (
            key,
            f"warmup_steps ({warmup}) must be below max_steps ({steps}), or the learning rate never reaches lr. Set "
            "optimizer.warmup_steps=0, or take more steps",
        )


def _memory(settings: Settings) -> Iterator[KeyProblem]:
    memory = settings.get("training.memory")
    if isinstance(memory, str) and memory != "auto":
        try:
            parse_size(memory)
        except ValueError as error:
            yield "training.memory", f"{error}, or auto for 95% of the free memory"


def _checkpointing(settings: Settings) -> Iterator[KeyProblem]:
    recomputed = settings.get("training.activation_checkpointing")
    if recomputed is None or settings.get("training.memory") is not None:
        return  # an unusable value, or one that the memory plan sets
    layers = recomputed if isinstance(recomputed, Mapping) else {recomputed: 1}
    if settings.get("training.activation_offloading") and not layers.get("full"):
        yield (
            "training.activation_offloading",
            "needs layers that are fully recomputed; write activation_checkpointing: full, or leave this key out",
        )
    method = METHODS.get(str(settings.get("adapter.method")))
    if layers.get("mlp") and method is not None and not method.fused:
        yield (
            "training.activation_checkpointing",
            "mlp needs qlora's own passes of frozen layers with LoRA; with adapter.method: "
            f"{settings['adapter.method']}, write full or none",
        )


def _sources(settings: Settings) -> Iterator[KeyProblem]:
    sources = settings.get("data.sources")
    if sources is None or "data.source" not in settings:
        return  # unusable, which the schema reports
    if not sources:
        if settings["data.source"] is None:
            text = "is required: A file, a folder, bundled/<name> or a hub id; or data.sources for several of them"
            yield "data.source", text
        return
    if settings["data.source"] is not None:
        yield "data.sources", "and data.source are both set; leave one of them out"
    counted = [[key for key in ("weight", "rows") if source.get(key) is not None] for source in sources]
    if any(len(keys) == 2 for keys in counted):
        yield "data.sources", "a source has a weight and a number of rows; leave one of them out"
    elif ["weight"] in counted and any(keys != ["weight"] for keys in counted):
        yield "data.sources", "some sources have a weight, so give each of them one"
    for source in sources:
        yield from _columns({"data.format": settings.get("data.format"), **_prefixed(source)}, "data.sources")


def _prefixed(source: Settings) -> dict[str, Any]:
    return {f"data.{key}": value for key, value in source.items() if value is not None}


def _rows(settings: Settings) -> Iterator[KeyProblem]:
    held_out = settings.get("data.held_out")
    limit = settings.get("data.limit")
    if settings.get("data.too_long") == "split":
        formats = [source.get("format") for source in settings.get("data.sources") or [{}]]
        raw = [format or settings.get("data.format") for format in formats]
        if not PLAIN_TEXT.issuperset(raw):
            yield "data.too_long", f"split needs a format of plain text ({' or '.join(sorted(PLAIN_TEXT))})"
    if isinstance(held_out, int) and limit and held_out >= limit and not settings.get("data.sources"):
        yield "data.held_out", f"must be below data.limit ({limit}), or no row is left to train on"
    if isinstance(held_out, str):
        if held_out == settings.get("data.source"):
            yield (
                "data.held_out",
                "is the same as data.source; use another source, a share or a number of rows",
            )
        elif set(held_out) <= set("0123456789+-._eE%: ") and any(map(str.isdigit, held_out)):
            text = f"{shorten(held_out)!r} is text; write a share as 0.02, or a number of rows as 100"
            yield "data.held_out", text


def _columns(settings: Settings, key: str = "data.columns") -> Iterator[KeyProblem]:
    format = FORMATS.get(str(settings.get("data.format")))
    if format is None:
        return
    for name in settings.get("data.columns", ()):
        if name not in format.fields:
            near = get_close_matches(name, format.fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(format.fields)}"
            yield key, f"the {format.name} format has no field {shorten(name)!r}; {hint}"


def _raw_pairs(settings: Settings) -> Iterator[KeyProblem]:
    """Prompts and completions are used as they are unless a template is named."""
    format = FORMATS.get(str(settings.get("data.format")))
    if (
        format is None
        or format.kind != "pair"
        or settings.get("data.template")
        or settings.get("data.sources")
    ):
        return
    plain: dict[str, Any] = {
        "system": None,
        "system_as": "system",
        "examples": "conversation",
        "template_options": {},
    }
    for key, without in plain.items():
        if settings.get(f"data.{key}", without) != without:
            yield (
                f"data.{key}",
                f"has no effect with data.format: {format.name} and no data.template; set a template",
            )


def _patterns(settings: Settings) -> Iterator[KeyProblem]:
    for key in (
        "adapter.targets", "adapter.rank_pattern", "adapter.alpha_pattern", "adapter.train_modules",
    ):  # fmt: skip
        entries = settings.get(key, ())
        for entry in () if isinstance(entries, str) else entries:
            if reason := _not_a_pattern(entry):
                yield key, f"{shorten(entry)!r} is not a valid regular expression: {reason}"


def _budget(settings: Settings) -> Iterator[KeyProblem]:
    facts = METHODS.get(settings.get("adapter.method", ""))
    if facts is None or set(BUDGET_KEYS) <= set(facts.unused):
        return
    first, last = settings.get("adapter.budget.initial_rank"), settings.get("adapter.rank")
    if first is not None and last is not None and first < last:
        yield "adapter.budget.initial_rank", f"must be at least adapter.rank ({last}), the average at the end"
    start, final = settings.get("adapter.budget.start"), settings.get("adapter.budget.final")
    if start is not None and final is not None and start + final >= 1:
        yield "adapter.budget.final", f"start ({start:g}) and final ({final:g}) must be below 1 together"


def _not_a_pattern(text: str) -> str:
    """Return the reason why text is not a regular expression; empty if it is one."""
    try:
        with (
            warnings.catch_warnings()
        ):  # re warns about syntax that later versions of Python can read differently
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def _evaluations(settings: Settings) -> Iterator[KeyProblem]:
    facts = METHODS.get(str(settings.get("adapter.method")))
    for key, asked in (
        ("training.patience", settings.get("training.patience") is not None),
        ("training.result", settings.get("training.result") == "best"),
    ):
        if asked and "training.eval_every" in settings and settings["training.eval_every"] is None:
            yield key, "needs evaluations during the run; set training.eval_every"
        if asked and facts is not None and facts.plans_its_length:
            method = settings["adapter.method"]
            yield (
                key,
                f"{method} changes its ranks until the last step, so no earlier step has a result; leave it out",
            )


def _best_by(settings: Settings, given: Settings) -> Iterator[KeyProblem]:
    number = given.get("training.best_by")
    if number == "highest loss":
        yield "training.best_by", "a higher loss is worse; write lowest loss, or leave it out"
    unused = settings.get("training.patience") is None and settings.get("training.result") == "last"
    # A recorded recipe has every default, and an override can set `result: last` for once
    if number not in (None, "lowest loss") and unused and "training.result" not in given:
        yield (
            "training.best_by",
            "has no effect without training.result: best or training.patience; set one of them",
        )
