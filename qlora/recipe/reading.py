"""YAML text -> plain values, and for every key the place where it was written.

ruamel.yaml parses; the values are built here from its events, so that everything a recipe has no use for
(aliases, tags, several documents, deep nesting) is refused before it can cost time or memory, and each
problem has its line.
"""

from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from qlora.recipe.problems import FORBIDDEN, SECRET, UNUSABLE, Document, KeyPath, Place, Problem, shorten
from qlora.recipe.scalars import scalar

MAX_DEPTH = 8  # the deepest setting, an item of tracking.wandb.tags, is at 4
MAX_EVENTS = 4_096  # about 0.1 s of parsing; a rank for each of the 560 linears of a 65B takes 1,120
MAX_PROBLEMS = 100


def read(text: str, source: str, *, at: KeyPath = (), numbered: bool = True) -> Document:
    """Parse one YAML document. `at` is the setting that it is the value of, on the command line."""
    document = Document(source)
    if numbered:
        document.places[at] = Place(source, 1, 1)
    try:
        _Builder(text, document, at, numbered).build()
    except _Stop as stop:
        document.problems.append(stop.problem)
        document.value = UNUSABLE
    return document


class _Stop(Exception):
    """Nothing after this problem is read."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Builder:
    """Makes values out of the events of a YAML text."""

    def __init__(self, text: str, document: Document, root: KeyPath, numbered: bool) -> None:
        self.text = text
        self.document = document
        self.root = root
        self.numbered = numbered
        self.events = self._parse()

    def build(self) -> None:
        """Fill in the document: the text holds one mapping, list or scalar, or nothing at all."""
        value: Any = None
        documents = 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Stop(self._problem(event, self.root, "a second document begins here; one is all"))
                if event.version not in (None, (1, 2)):
                    raise _Stop(self._problem(event, self.root, "recipes are YAML 1.2; drop the %YAML line"))
            elif isinstance(event, NodeEvent):
                self.document.places.setdefault(self.root, self._place(event, event))
                value = self._value(event, self.root)
        self.document.value = value

    def _value(self, event: Any, path: KeyPath) -> Any:
        """The value that begins with this event."""
        if refusal := self._refusal(event):
            self._note(self.document.places[path], path, refusal)
            self._skip(event)
            return UNUSABLE
        if isinstance(event, ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            raise _Stop(self._problem(event, (), f"nested more than {MAX_DEPTH} levels deep"))
        return self._mapping(path) if isinstance(event, MappingStartEvent) else self._sequence(path)

    def _sequence(self, path: KeyPath) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            item = (*path, len(values))
            self.document.places[item] = self._place(event, event)
            values.append(self._value(event, item))
        return values

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(key := next(self.events), MappingEndEvent):
            name = self._key(key, path, values)
            event = next(self.events)
            if name is None:
                self._skip(event)
            else:
                self.document.places[(*path, name)] = self._place(key, event)
                values[name] = self._value(event, (*path, name))
        return values

    def _key(self, event: Any, path: KeyPath, siblings: dict[str, Any]) -> str | None:
        """The name that a key's event spells; None, with the problem noted, if it cannot be used."""
        problem = self._refusal(event)
        name = event.value if isinstance(event, ScalarEvent) else ""
        inner = (*path, name) if name else path
        if not problem and not isinstance(event, ScalarEvent):
            problem = "a key is text, not a list or mapping"
        elif not problem and event.implicit[0] and not isinstance(scalar(name), str):
            problem = "a key is text; put it in quotes" if name else "there is no key before this ':'"
        elif not problem and name in siblings:
            first = self.document.places[inner]
            problem = f"is here twice{f', first on line {first.line}' if first.line else ''}; keep one"
        if not problem:
            return str(name)
        self._note(self._place(event, event), inner, problem)
        self._skip(event)
        return None

    def _refusal(self, event: Any) -> str:
        """Why a recipe has no use for this key or value; empty if it has."""
        if isinstance(event, AliasEvent) or event.anchor:
            return "anchors and aliases (& and *) are not for recipes; write the value out"
        if event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            return f"tags are not for recipes; leave {shorten(tag)} out"
        if isinstance(event, ScalarEvent) and SECRET.search(event.value):
            return (
                "looks like an access token or password, which a recipe would store with its run; "
                "keep it in the environment (HF_TOKEN, WANDB_API_KEY)"
            )
        if isinstance(event, ScalarEvent) and (found := FORBIDDEN.search(event.value)):
            return f"has the character U+{ord(found.group()):04X} in it, which no setting needs"
        return ""

    def _skip(self, event: Any) -> None:
        """Pass over the rest of the value that begins with this event."""
        depth = int(isinstance(event, CollectionStartEvent))
        while depth:
            event = next(self.events)
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)

    def _note(self, place: Place, path: KeyPath, text: str) -> None:
        self.document.problems.append(Problem(place, path or self.root, text))
        if len(self.document.problems) >= MAX_PROBLEMS:
            raise _Stop(Problem(place, self.root, "and this is where reading stops: too much is wrong"))

    def _problem(self, event: Any, path: KeyPath, text: str) -> Problem:
        return Problem(self._place(event, event), path or self.root, text)

    def _place(self, key: Any, value: Any) -> Place:
        """The place of a key, with its value as it stands in the text (a word for what is longer)."""
        if isinstance(value, MappingStartEvent):
            written = "a mapping"
        elif isinstance(value, CollectionStartEvent):
            written = "a list"
        else:
            written = shorten(self.text[value.start_mark.index : value.end_mark.index])
        return self._at(key.start_mark, written)

    def _at(self, mark: Any, written: str = "") -> Place:
        line, column = (mark.line + 1, mark.column + 1) if self.numbered and mark else (0, 0)
        return Place(self.document.source, line, column, written)

    def _parse(self) -> Iterator[Any]:
        """ruamel.yaml's events; what it raises becomes a problem with a place."""
        try:
            for count, event in enumerate(YAML(typ="safe", pure=True).parse(self.text)):
                if count > MAX_EVENTS:
                    text = f"more than {MAX_EVENTS} keys and values, as no recipe has"
                    raise _Stop(self._problem(event, self.root, text))
                yield event
        except MarkedYAMLError as error:
            mark, text = _explain(error)
            raise _Stop(Problem(self._at(mark), self.root, f"is not valid YAML: {text}")) from None
        except (YAMLError, ValueError, OverflowError):
            # an escape beyond Unicode, such as "\UFFFFFFFF", surfaces as chr()'s own error
            raise _Stop(Problem(Place(self.document.source), self.root, "is not valid YAML")) from None


def _explain(error: MarkedYAMLError) -> tuple[Any, str]:
    """ruamel's marks and words for a syntax error -> the mark and the words that help most."""
    problem, context = error.problem or "", error.context or ""
    if "'\\t'" in problem:
        return error.problem_mark, "indent with spaces; a tab cannot stand here"
    if "mapping values are not allowed" in problem:
        return error.problem_mark, "a ':' that does not fit; check the indentation, or put the text in quotes"
    if "simple key" in context:
        return error.context_mark, "a key without ':' after it"
    if "quoted scalar" in context and "end of stream" in problem:
        return error.context_mark, "a quote is opened here and not closed"
    if "flow" in context:
        return error.context_mark, "a bracket is opened here and not closed, or a ',' is missing within it"
    if "block" in context:
        return error.problem_mark, "the indentation does not fit the lines above"
    return error.problem_mark or error.context_mark, problem
