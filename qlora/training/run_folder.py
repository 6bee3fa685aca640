"""A run's folder: claimed by one run, never overwritten without --fresh, and consistent after a kill.

    runs/<name>/run.json recipe.yaml metrics.jsonl checkpoints/ adapter/ (or model/) result.json

run.json holds the run's id and is written first. While it contains `starting`, the folder belongs to a new run and all
other files in it are ignored. --fresh therefore discards the old run in one instant, when it replaces run.json. A kill
before that instant leaves the old run complete. After a later kill, the next start removes what is left of the old run.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, RecipeError, UsageError
from qlora.recipe import Recipe, Training
from qlora.recipe.versions import NewerRecipe, translated
from qlora.storage import atomic, folders, manifest, regular_file
from qlora.storage.json_files import with_checksum, without_checksum
from qlora.tracking import BACKENDS
from qlora.training import checkpoint
from qlora.training.recipe_changes import RESUMABLE_KEYS, ROUNDING_KEYS, differences, effect_of, keys_since

# Everything that a run writes, and the only names that --fresh removes.
CONTENTS = (
    "run.json", "recipe.yaml", "facts.json", "metrics.jsonl", "result.json", "checkpoints", "best", "adapter",
    "model", *BACKENDS, "report.html", "memory.json", "memory.md", "memory.png",
)  # fmt: skip

RESULTS = ("adapter", "model")

# Those of CONTENTS that only qlora writes: next to one of them, folders named like a run's are a run's.
RUN_ONLY_FILES = {"facts.json", "metrics.jsonl", "result.json", "memory.json", "report.html"}

# Names inside the folders of a run.
NAME_PATTERNS = {
    "checkpoints": re.compile(r"(\.tmp-|\.trash-)?step-\d+(~\d+)?"),
    **{name: backend.files for name, backend in BACKENDS.items()},
}

# The lock, and what an unfinished write leaves next to the contents.
LEFTOVERS = {
    ".lock",
    *(f"{prefix}{name}" for prefix in (folders.TEMPORARY, folders.TRASH) for name in CONTENTS),
}

_warn = logging.getLogger("qlora").warning


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder, and the run id that its files carry."""

    path: Path
    run_id: str
    plan: dict[str, Any] | None = None
    """settings that the memory budget chose when the run began; a resumed run keeps them"""

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Store the facts about the run that are known before its first step."""
        atomic.write(self.path / "facts.json", (json.dumps(facts, indent=2) + "\n").encode())

    def write_result(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        atomic.write(self.path / "result.json", _json({**summary, "run_id": self.run_id}, indent=2))

    def reopen(self) -> None:
        """Mark a finished run as unfinished, because it becomes longer. Its adapter stays until the next result."""
        with folders.save_errors(self.path):
            (self.path / "result.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Earlier:
    """The run that a folder already holds."""

    run_id: str
    plan: dict[str, Any] | None
    source: Path
    """file with the run's id: run.json or, if it is missing or damaged, a checkpoint's manifest or result.json"""
    starting: bool = False
    """True if only run.json belongs to this run yet"""


def finished(path: Path) -> dict[str, Any] | None:
    """Return the summary of the run in `path` if it is finished, else None.

    Raises:
        ModelError: result.json or run.json is damaged, and no other file in the folder can replace it.
    """
    file = path / "result.json"
    if not file.is_file():
        return None
    earlier = _earlier(path)
    if earlier is not None and earlier.starting:
        return None
    try:
        summary = _object(file)
    except ValueError as error:
        raise damaged_result(file, str(error)) from error
    # Earlier versions wrote no run id into the result.
    return summary if earlier is None or summary.get("run_id", earlier.run_id) == earlier.run_id else None


def damaged_result(file: Path, why: str) -> ModelError:
    """Return the error for a damaged result.json."""
    return ModelError(
        f"{file}: damaged ({why}). Restore it from a copy, or remove it and resume from the newest checkpoint with "
        "--resume"
    )


def earlier_plan(path: Path) -> dict[str, Any] | None:
    """Return the plan of the run in `path`; None if it has no plan, or there is no run.

    Raises:
        ModelError: run.json is damaged, and no other file in the folder can replace it.
    """
    earlier = _earlier(path)
    return None if earlier is None else earlier.plan


def earlier_run_id(path: Path) -> str | None:
    """Return the id of the run in `path`; None if there is none, or it has only begun to replace another one.

    Raises:
        ModelError: run.json is damaged, and no other file in the folder can replace it.
    """
    earlier = _earlier(path)
    return None if earlier is None or earlier.starting else earlier.run_id


def check_output(recipe: Recipe, path: Path, *, resume: bool, fresh: bool) -> bool:
    """Check that a run can use `path`, and return True if the folder already holds a run. Writes nothing.

    Raises:
        RecipeError: the folder holds a run, and neither `resume` nor `fresh` is set; it holds files of something else;
            or the run to resume has a different recipe.
        ModelError: the run to resume is damaged.
    """
    if resume and fresh:
        raise UsageError("resume continues a run, and fresh replaces it; choose one of them")
    for place in (path, *path.parents):
        if place.is_symlink() and not os.path.exists(place):  # noqa: PTH110 - Path.exists raises for some links
            raise RecipeError(
                f"output: {place} is a broken symbolic link to {place.readlink()}. Remove or mend it, or choose "
                "another folder with output=..."
            )
    if (start := recipe.adapter.start_from) is not None and _is_inside(Path(start), path):
        raise RecipeError(
            f"output: the run would replace {path}, which holds the adapter that it continues (adapter.from={start}). "
            "Choose another folder with output=..."
        )
    if path.exists() and not path.is_dir():
        raise RecipeError(f"output: {path} is a file, not a folder. Choose another with output=...")
    names = {child.name for child in path.iterdir()} if path.is_dir() else set()
    ours = {*CONTENTS, *LEFTOVERS}
    if links := sorted(name for name in names if name in ours and (path / name).is_symlink()):
        raise RecipeError(
            f"output: {path / links[0]} is a symbolic link, and a run writes through none: it could lead to another "
            "file. Remove it. To keep a run on another disk, set output to a folder there, or link the whole folder"
        )
    existing = not names.isdisjoint(CONTENTS)
    if not _is_ours(path, names):
        raise RecipeError(
            f"output: {path} exists and is not a run of qlora. Choose another folder with output=..."
        )
    if existing and not (resume or fresh):
        raise RecipeError(
            f"output: {path} already holds a run. Resume it (--resume), replace it (--fresh), or choose another "
            "folder with output=..."
        )
    if existing and resume:
        _check_same(recipe, path)
    return existing


def claim(
    recipe: Recipe, path: Path, *, resume: bool, fresh: bool, plan: dict[str, Any] | None = None
) -> RunFolder:
    """Claim `path` for this run. The caller must hold the folder's lock.

    A new folder is made. An existing run needs `resume` (continue it) or `fresh` (remove it and start again).
    Both start a run again that was killed while it was starting.

    Raises:
        QloraError: as `check_output`.
        SaveError: the folder cannot be written. It then holds the old run, or the beginning of the new one.
    """
    existing = check_output(recipe, path, resume=resume, fresh=fresh)
    earlier = _earlier(path) if existing and resume else None
    if earlier is None or earlier.starting:
        run = RunFolder(path, secrets.token_hex(8) if earlier is None else earlier.run_id, plan)
        _start(run, recipe)
    else:
        run = RunFolder(path, earlier.run_id, earlier.plan if plan is None else plan)
        for name in ("best", *RESULTS):
            folders.recover(path, name)
        folders.recover(path / "checkpoints", "step-*")
        _continue(run, recipe, earlier.source)
    return run


def _start(run: RunFolder, recipe: Recipe) -> None:
    """Start a new run in the folder. A kill at any instant leaves the old run or the beginning of the new one."""
    with folders.save_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        atomic.sync(run.path.parent)
    # This write discards the old run, if there is one.
    atomic.write(run.path / "run.json", _json({"run_id": run.run_id, "starting": True}))
    kept = {"run.json", "recipe.yaml"}  # these two mark the folder as a run, whatever else is in it
    if (run.path / "recipe.yaml").is_dir():  # a file cannot replace a folder
        kept.remove("recipe.yaml")
    folders.clear(run.path, [name for name in CONTENTS if name not in kept])
    atomic.write(run.path / "recipe.yaml", recipe.to_yaml().encode())
    atomic.write(run.path / "run.json", _json({"run_id": run.run_id, "plan": run.plan}))


def _continue(run: RunFolder, recipe: Recipe, source: Path) -> None:
    """Rewrite run.json and recipe.yaml if they are damaged or have changed; leave correct files untouched."""
    if source != run.path / "run.json":
        _warn(f"{run.path / 'run.json'} was missing or damaged; rewritten with the run id from {source}")
    before = recorded(run.path / "recipe.yaml")
    if before is None:
        _warn(f"{run.path / 'recipe.yaml'} was missing or damaged; rewritten from the given recipe")
    elif recipe.adapter.dropout and not (run.path / "recipe.yaml").read_text().startswith("version:"):
        _warn(
            "this run was begun by an earlier version of qlora, which drew dropout by micro-batch; from here on it is "
            "drawn by row, so the adapter will differ from the one that the earlier version would have trained"
        )
    for key, old, new in differences(before.to_dict(), recipe.to_dict(), set()) if before else ():
        if any(f"{key}.".startswith(f"{changing}.") for changing in ROUNDING_KEYS):
            _warn(f"{key}: {old} then, {new} now. {effect_of(key, run.path / 'metrics.jsonl')}")
    _replace(run.path / "run.json", _json({"run_id": run.run_id, "plan": run.plan}))
    _replace(run.path / "recipe.yaml", recipe.to_yaml().encode())


def _is_inside(folder: Path, output: Path) -> bool:
    """Return True if a folder is the output or in it, also through links."""
    return folder.resolve().is_relative_to(output.resolve())


def _is_ours(path: Path, names: set[str]) -> bool:
    """Return True if a run can use a folder with these names: it holds a run, or only what runs leave behind."""
    if {"run.json", "recipe.yaml"} <= names or any(path.glob("checkpoints/step-*/manifest.json")):
        return True  # even if the user keeps other files in it
    left = {name for name in names if folders.without_number(name) not in LEFTOVERS}
    if not left <= set(CONTENTS):
        return False
    return not left.isdisjoint(RUN_ONLY_FILES) or all(_written_by_a_run(path / name) for name in left)


def _written_by_a_run(path: Path) -> bool:
    """Return True if a run wrote this file or folder; False if the user made it under a name that runs use."""
    if not path.is_dir():
        return path.name not in (*RESULTS, *NAME_PATTERNS)
    pattern = NAME_PATTERNS.get(path.name)
    inside = [child.name for child in path.iterdir()]
    return not inside or (pattern is not None and all(map(pattern.fullmatch, inside)))


def _earlier(path: Path) -> _Earlier | None:
    """Find the run in a folder: by run.json, else by its newest checkpoint, else by result.json.

    Raises:
        ModelError: the folder holds trained weights or a damaged run.json, and no file gives the run's id.
    """
    file = path / "run.json"
    problem = "missing"
    if os.path.lexists(file):
        try:
            return _from_json(_object(file), file)
        except ValueError as error:
            problem = f"damaged ({error})"
    if (folder := checkpoint.newest(path, checksums=False)) is not None:
        plan = _plan(checkpoint.read_state(folder))
        return _Earlier(manifest.read(folder)["run_id"], plan, folder / manifest.MANIFEST)
    result = path / "result.json"
    try:
        return _from_json(_object(result), result)
    except ValueError:
        pass
    if problem == "missing" and not any(
        (path / name).exists() for name in ("adapter", "model", "result.json")
    ):
        return None  # nothing has been trained
    raise ModelError(
        f"{file}: {problem}, and there is no checkpoint to take the run's id from. Restore the file from a copy, or "
        "start again with --fresh"
    )


def _from_json(content: Mapping[str, Any], source: Path) -> _Earlier:
    """Read the run's id and plan from the content of run.json or result.json. Raises ValueError if invalid."""
    run_id, plan, starting = content.get("run_id"), _plan(content), content.get("starting", False)
    if not (isinstance(run_id, str) and run_id and isinstance(starting, bool)):
        raise ValueError("it has no valid run id")
    if plan is not None and not _is_plan(plan):
        raise ValueError("its plan has invalid settings")
    return _Earlier(run_id, plan, source, starting)


def _plan(content: Mapping[str, Any]) -> Any:
    """Return the plan in run.json or in a checkpoint's state, with the keys of earlier versions translated."""
    plan = content.get("plan")
    return translated("training", plan) if isinstance(plan, dict) else plan


def _is_plan(plan: Any) -> bool:
    """Return True if the plan holds only valid settings of the section `training`."""
    if not (isinstance(plan, dict) and plan.keys() <= Training.model_fields.keys()):
        return False
    try:
        Training.model_validate(plan, strict=True)
    except ValueError:
        return False
    return True


def _check_same(recipe: Recipe, path: Path) -> None:
    """Raise RecipeError if the recipe differs from that of the run in `path` in a key that must not change."""
    earlier = _earlier(path)
    if earlier is None or earlier.starting:
        return
    before, may_change = _recipe_before(path, earlier)
    if recipe.training.memory is None:  # else the plan that began the run is kept
        may_change = may_change | ROUNDING_KEYS
    changed = [] if before is None else list(differences(before, recipe.to_dict(), may_change))
    if changed:
        lines = "\n".join(f"  {key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise RecipeError(
            f"{path}: the recipe has changed since the run began, so the run cannot be resumed:\n{lines}\n"
            "Restore the old values, or start again with --fresh or another output"
        )


def _recipe_before(path: Path, earlier: _Earlier) -> tuple[dict[str, Any] | None, set[str]]:
    """Return the settings that the run began with (None if no step was taken) and the keys that can differ now.

    If recipe.yaml is missing or damaged, use the copy in the newest checkpoint, which already contains the plan.
    """
    file = path / "recipe.yaml"
    if (recipe := recorded(file)) is not None:
        return recipe.to_dict(), RESUMABLE_KEYS | keys_since(file)
    folder = checkpoint.newest(path, run_id=earlier.run_id, checksums=False)
    if folder is None:
        return None, RESUMABLE_KEYS
    copy = folder / ("adapter" if (folder / "adapter").is_dir() else "model") / "recipe.yaml"
    if not copy.is_file():
        raise ModelError(
            f"{file}: missing or damaged, and {folder} has no copy of it. Restore it, or start again with --fresh"
        )
    planned = {"training.memory", *(f"training.{key}" for key in earlier.plan or {})}
    return Recipe.recorded(copy).to_dict(), RESUMABLE_KEYS | planned | keys_since(copy)


def recorded(file: Path) -> Recipe | None:
    """Read the recipe in a file; return None if it is missing or damaged."""
    try:
        return Recipe.recorded(file)
    except NewerRecipe:
        raise
    except RecipeError:
        return None


def _object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises ValueError for any problem, also if the file is missing."""
    try:
        content = json.loads(regular_file.read(file))
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return without_checksum(content)


def _replace(file: Path, content: bytes) -> None:
    """Write a file unless it already has this content."""
    if not (file.is_file() and file.read_bytes() == content):
        atomic.write(file, content)


def _json(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(with_checksum(content), indent=indent) + "\n").encode()
