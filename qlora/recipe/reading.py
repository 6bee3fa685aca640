"""Reads YAML text into plain values, with the place of every key.

ruamel.yaml parses the text. The values are built here from its events, so that features a recipe does not need
(aliases, tags, several documents, deep nesting) are rejected before they cost time or memory, and each problem has
a line number.
"""

import re
from collections.abc import Container, Iterator
from typing import Any, NoReturn

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qlora.recipe.problems import FORBIDDEN, SECRET, UNUSABLE, Document, KeyPath, Place, Problem, shorten
from qlora.recipe.scalars import scalar

MAX_DEPTH = 8  # levels; the deepest setting, an item of tracking.wandb.tags, is at 4
MAX_EVENTS = (
    4_096  # parsed in about 0.1 s; a rank for each of the 560 linear layers of a 65B model takes 1,120
)
MAX_PROBLEMS = 100


def read(text: str, source: str, *, at: KeyPath = (), numbered: bool = True) -> Document:
    """Parse one YAML document.

    Args:
        text: the YAML text.
        source: name of the text in messages: a path, or the command line.
        at: the setting whose value the text is, for an override.
        numbered: give places a line and a column.
    """
    document = Document(source)
    if numbered:
        document.places[at] = Place(source, 1, 1)
    try:
        document.value = _Reader(text, document, at, numbered).root_value()
    except _Stop:
        document.value = UNUSABLE
    return document


class _Stop(Exception):
    """Ends the reading; the problem is in the document."""


class _Reader:
    """Builds values from the events of a YAML text; records places and problems in its document."""

    def __init__(self, text: str, document: Document, root: KeyPath, numbered: bool) -> None:
        self.text = text
        self.document = document
        self.root = root
        self.numbered = numbered
        self.events = self._parse()

    def root_value(self) -> Any:
        """Return the mapping, list or scalar that the text contains; None if it is empty."""
        value: Any = None
        documents = 0
        for event in self.events:
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._stop(event.start_mark, "a second YAML document begins here; write only one")
                if event.version not in (None, (1, 2)):
                    self._stop(event.start_mark, "a recipe is YAML 1.2; delete the %YAML line")
            elif isinstance(event, events.NodeEvent):
                self.document.places.setdefault(self.root, self._place(event.start_mark, event))
                value = self._value(event, self.root)
        return value

    def _value(self, event: Any, path: KeyPath) -> Any:
        """Return the value that begins with this event."""
        if refusal := _refusal(event, path):
            self._note(self.document.places[path], path, refusal)
            self._skip(event)
            return UNUSABLE
        if isinstance(event, events.ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            self._stop(
                event.start_mark, f"is nested more than {MAX_DEPTH} levels deep; no setting needs that"
            )
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(path)
        return [self._entry((*path, index), item, item) for index, item in enumerate(self._inside())]

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key in self._inside():
            name = key.value if isinstance(key, events.ScalarEvent) else ""
            if problem := _refusal(key, path) or self._key_problem(key, (*path, name), values):
                self._note(self._place(key.start_mark), (*path, name) if name else path, problem)
                self._skip(key)
                self._skip(next(self.events))
            else:
                values[name] = self._entry((*path, name), key, next(self.events))
        return values

    def _inside(self) -> Iterator[Any]:
        """Yield the event of each item or key of the open collection; the caller reads its value."""
        while not isinstance(event := next(self.events), events.CollectionEndEvent):
            yield event

    def _entry(self, path: KeyPath, key: Any, event: Any) -> Any:
        self.document.places[path] = self._place(key.start_mark, event)
        return self._value(event, path)

    def _key_problem(self, key: Any, path: KeyPath, siblings: Container[str]) -> str:
        """Return the reason why a mapping cannot have this key; empty if it can."""
        if not isinstance(key, events.ScalarEvent):
            return "a key must be text, not a list or mapping"
        if key.implicit[0] and not isinstance(scalar(key.value), str):
            return (
                "a key must be text; put it in quotes" if key.value else "the key before this ':' is missing"
            )
        if key.value in siblings:
            line = self.document.places[path].line
            return f"is set twice{f', first on line {line}' if line else ''}; keep one"
        return ""

    def _skip(self, event: Any) -> None:
        """Skip the rest of the value that begins with this event."""
        depth = int(isinstance(event, events.CollectionStartEvent))
        while depth:
            event = next(self.events)
            depth += isinstance(event, events.CollectionStartEvent)
            depth -= isinstance(event, events.CollectionEndEvent)

    def _note(self, place: Place, path: KeyPath, text: str) -> None:
        problems = self.document.problems
        problems.append(Problem(place, path or self.root, text))
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(place, self.root, "too many problems; the rest was not read"))
            raise _Stop

    def _stop(self, mark: Any, text: str) -> NoReturn:
        self.document.problems.append(Problem(self._place(mark), self.root, text))
        raise _Stop

    def _place(self, mark: Any, value: Any = None) -> Place:
        """Return the place of a mark, with the scalar written there, or `a mapping` or `a list`."""
        if isinstance(value, events.CollectionStartEvent):
            written = "a mapping" if isinstance(value, events.MappingStartEvent) else "a list"
        else:
            written = shorten(self.text[value.start_mark.index : value.end_mark.index]) if value else ""
        line, column = (mark.line + 1, mark.column + 1) if self.numbered and mark else (0, 0)
        return Place(self.document.source, line, column, written)

    def _parse(self) -> Iterator[Any]:
        """Yield ruamel.yaml's events; turn its errors into problems with a place."""
        try:
            for count, event in enumerate(YAML(typ="safe", pure=True).parse(self.text)):
                if count > MAX_EVENTS:
                    self._stop(
                        event.start_mark, f"more than {MAX_EVENTS} keys and values; no recipe needs that many"
                    )
                yield event
        except MarkedYAMLError as error:
            mark, text = _explain(error)
            self._stop(mark, f"is not valid YAML: {text}")
        except (YAMLError, ValueError, OverflowError):
            # chr() raises for an escape beyond Unicode, such as "\UFFFFFFFF"
            found = FORBIDDEN.search(self.text)  # in an override, or a byte that the locale cannot decode
            reason = f": the character U+{ord(found.group()):04X} is not allowed; delete it" if found else ""
            self._stop(None, f"is not valid YAML{reason}")


def _refusal(event: Any, path: KeyPath) -> str:
    """Return the reason why a recipe cannot contain this key or value at `path`; empty if it can."""
    if isinstance(event, events.AliasEvent) or event.anchor:
        return "anchors and aliases (& and *) are not allowed in a recipe; write the value out"
    if event.tag:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        return f"tags are not allowed in a recipe; leave {shorten(tag)} out"
    if (
        isinstance(event, events.ScalarEvent)
        and SECRET.search(event.value)
        and not _is_commit(path, event.value)
    ):
        return (
            "looks like an access token or password, and a recipe is stored with its run; "
            "keep it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    if isinstance(event, events.ScalarEvent) and (match := FORBIDDEN.search(event.value)):
        return f"contains the character U+{ord(match.group()):04X}, which is not allowed; delete it"
    return ""


def _is_commit(path: KeyPath, text: str) -> bool:
    """Return True for the commit of a model or data set, which looks like an old key of Weights & Biases."""
    return path[-1:] == ("revision",) and re.fullmatch("[0-9a-f]{40}", text) is not None


def _explain(error: MarkedYAMLError) -> tuple[Any, str]:
    """Return the most helpful mark and a plain description of ruamel's syntax error."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return error.problem_mark, "a tab is not allowed here; indent with spaces"
    if "mapping values are not allowed" in problem:
        return error.problem_mark, "unexpected ':'; check the indentation, or put the text in quotes"
    if "simple key" in context:
        return error.context_mark, "this key has no ':' after it"
    if "quoted scalar" in context and "end of stream" in problem:
        return error.context_mark, "a quote is opened here but not closed"
    if "flow" in context:
        return error.context_mark, "a bracket is opened here but not closed, or a ',' is missing inside it"
    if "block" in context:
        return error.problem_mark, "the indentation does not match the lines above"
    return error.problem_mark or error.context_mark, shorten(problem, 200)  # it may quote the text
