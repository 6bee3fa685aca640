"""Make a recipe of a document, or raise one error that lists all its problems."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from qlora.errors import RecipeError
from qlora.recipe.messages import explain
from qlora.recipe.overrides import COMMAND_LINE
from qlora.recipe.problems import UNUSABLE, Document, Problem, dotted
from qlora.recipe.rules import ALTERNATIVES, conflicts, flatten, keys_without_effect
from qlora.recipe.schema import Recipe
from qlora.recipe.section import Section


def check(document: Document, name: str) -> Recipe:
    """Make the recipe called `name`.

    Raises:
        RecipeError: the document is wrong; the message has one line per problem.
    """
    if not isinstance(document.value, dict):
        if document.value is not UNUSABLE:
            text = "a recipe is a mapping of sections, such as base: and data:; write these"
            document.problems.append(Problem(document.place(()), (), text))
        raise _error(document.problems)
    if document.value.get("output") is None:
        document.value["output"] = f"runs/{name}"
    problems = [*document.problems, *_misfits(document)]
    unusable = {dotted(problem.path[:end]) for problem in problems for end in range(1, len(problem.path) + 1)}
    given = {key: value for key, value in flatten(document.value).items() if key not in unusable}
    settings = {key: value for key, value in DEFAULTS.items() if key not in unusable} | given
    for path in _overruled(document, settings, given):
        del given[dotted(path)]
        settings[dotted(path)] = DEFAULTS[dotted(path)]
        _remove(document.value, path)
    broken = {problem.path for problem in problems}  # such as a section that is missing
    for key, text in conflicts(settings, given):
        path = tuple(key.split("."))
        if path[:1] not in broken:
            problems.append(Problem(document.place(path), path, text))
    if problems:
        raise _error(problems)
    return Recipe.model_validate(document.value)


def _misfits(document: Document) -> list[Problem]:
    """Return the settings that do not fit the schema."""
    try:
        Recipe.model_validate(document.value)
    except ValidationError as error:
        return explain(error.errors(include_url=False), document, _schema())
    return []


@cache
def _schema() -> dict[str, Any]:
    return Recipe.json_schema()


def _overruled(
    document: Document, settings: Mapping[str, Any], given: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Return the keys of the file that lose their effect by an override; `check` removes them.

    In one place, a key without effect is a mistake. With an override it is not:
    `qlora train llama-7b adapter.method=full base.quantization=none` must work although the file sets a rank.
    """

    def overridden(key: str) -> bool:
        return document.place(tuple(key.split("."))).source == COMMAND_LINE

    causes = [*keys_without_effect(settings).items(), *ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)]
    return [
        tuple(key.split("."))
        for key, cause in causes
        if key in given and overridden(cause) and not overridden(key)
    ]


def _remove(settings: dict[str, Any], path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        settings = settings[name]
    del settings[path[-1]]


def _error(problems: Iterable[Problem]) -> RecipeError:
    """Return one error with all problems, first those of the file by line, then those of the command line."""

    def position(problem: Problem) -> tuple[bool, int, int]:
        return not problem.place.line, problem.place.line, problem.place.column

    return RecipeError("\n".join(str(problem) for problem in sorted(problems, key=position)))


def _defaults(section: type[Section], prefix: str = "") -> dict[str, Any]:
    """Return the default settings of a section, flattened and without the required ones."""
    flat: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            flat |= _defaults(kind, f"{prefix}{name}.")
        elif not field.is_required():
            flat[prefix + (field.alias or name)] = field.default
    return flat


DEFAULTS = _defaults(Recipe)
