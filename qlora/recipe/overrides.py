"""`section.key=value` on the command line, put over the settings of a file."""

from qlora.recipe.problems import Document, Place, Problem, dotted, shorten
from qlora.recipe.reading import read
from qlora.recipe.rules import MAPPINGS

COMMAND_LINE = "command line"


def override(document: Document, argument: str) -> None:
    """Put one `section.key=value`, its value in YAML, over a document's settings, or note what is wrong."""
    key, equals, text = argument.partition("=")
    path = _path(key.strip())
    if not equals or not all(path):
        problem = f"{shorten(argument)!r} is not key=value, as in training.max_steps=20"
        document.problems.append(Problem(Place(COMMAND_LINE), (), problem))
        return
    section = document.value
    for end, name in enumerate(path, start=1):
        if not isinstance(section, dict):
            problem = f"cannot be set: {dotted(path[: end - 1]) or 'the recipe'} has no keys of its own"
            document.problems.append(Problem(Place(COMMAND_LINE), path, problem))
            return
        if end < len(path):
            word = dotted(path[:end]) in MAPPINGS and not isinstance(section.get(name), dict)
            if word or section.get(name) is None:  # either gives way to a mapping
                section[name] = {}
                document.places[path[:end]] = Place(COMMAND_LINE, written="a mapping")
            section = section[name]
    value = read(text, COMMAND_LINE, at=path, numbered=False)
    section[path[-1]] = value.value
    kept = {inner: place for inner, place in document.places.items() if inner[: len(path)] != path}
    document.places = kept | {path: Place(COMMAND_LINE)} | value.places
    document.problems += value.problems


def _path(key: str) -> tuple[str, ...]:
    """`adapter.rank` -> `("adapter", "rank")`; the dots of a module's name in a mapping's key stay."""
    for mapping in MAPPINGS:
        if key.startswith(f"{mapping}."):
            return (*mapping.split("."), key.removeprefix(f"{mapping}."))
    return tuple(key.split("."))
