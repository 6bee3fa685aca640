"""Overrides: `section.key=value` on the command line replaces a setting of the file."""

from qlora.recipe.problems import Document, Place, Problem, dotted, shorten
from qlora.recipe.reading import MAX_DEPTH, read
from qlora.recipe.rules import MAPPINGS

COMMAND_LINE = "command line"


def override(document: Document, argument: str) -> None:
    """Apply one override, `section.key=value` with the value in YAML, to a document, or record the problem."""
    key, equals, text = argument.partition("=")
    path = _path(key.strip())
    if not equals or not all(path):
        problem = f"{shorten(argument)!r} is not key=value; write it like training.max_steps=100"
        document.problems.append(Problem(Place(COMMAND_LINE), (), problem))
        return
    if len(path) > MAX_DEPTH:
        problem = f"{shorten(key)!r} is nested more than {MAX_DEPTH} levels deep; no setting needs that"
        document.problems.append(Problem(Place(COMMAND_LINE), (), problem))
        return
    if path in (("output",), ("adapter", "from")) and not text.strip():
        # Without RUN, `output=$RUN --fresh` would replace the default run, and `adapter.from=$RUN` start anew
        problem = "is empty; name the folder of the run, or leave this setting out"
        document.problems.append(Problem(Place(COMMAND_LINE), path, problem))
        return
    section = document.value
    for end, name in enumerate(path, start=1):
        if not isinstance(section, dict):
            problem = f"cannot be set: {dotted(path[: end - 1]) or 'the recipe'} is a value, not a section"
            document.problems.append(Problem(Place(COMMAND_LINE), path, problem))
            return
        if end < len(path):
            word = dotted(path[:end]) in MAPPINGS and not isinstance(section.get(name), dict)
            if word or section.get(name) is None:  # a mapping replaces a word such as `full`, or nothing
                section[name] = {}
                document.places[path[:end]] = Place(COMMAND_LINE, written="a mapping")
            section = section[name]
    if text.strip() == "-":
        text = '"-"'  # the standard input, as in data.source=-; in YAML, a dash alone begins a list
    value = read(text, COMMAND_LINE, at=path, numbered=False)
    section[path[-1]] = value.value
    kept = {inner: place for inner, place in document.places.items() if inner[: len(path)] != path}
    document.places = kept | {path: Place(COMMAND_LINE)} | value.places
    document.problems += value.problems


def _path(key: str) -> tuple[str, ...]:
    """Split `adapter.rank` -> `("adapter", "rank")`; in a key of a mapping, the dots of a module name stay."""
    for mapping in MAPPINGS:
        if key.startswith(f"{mapping}."):
            return (*mapping.split("."), key.removeprefix(f"{mapping}."))
    return tuple(key.split("."))
