"""YAML text -> plain values, and for every key the place where it was written.

ruamel.yaml parses; the values are built here from its events, so that everything a recipe has no use for
(aliases, tags, several documents, deep nesting) is refused before it can cost time or memory, and each
problem has its line.
"""

from collections.abc import Container, Iterator
from typing import Any, NoReturn

from ruamel.yaml import YAML, events
from ruamel.yaml.error import MarkedYAMLError, YAMLError

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
        document.value = _Reader(text, document, at, numbered).root_value()
    except _Stop:
        document.value = UNUSABLE
    return document


class _Stop(Exception):
    """Nothing after this is read; the document has the problem."""


class _Reader:
    """Makes values out of the events of a YAML text; writes places and problems into its document."""

    def __init__(self, text: str, document: Document, root: KeyPath, numbered: bool) -> None:
        self.text = text
        self.document = document
        self.root = root
        self.numbered = numbered
        self.events = self._parse()

    def root_value(self) -> Any:
        """The one mapping, list or scalar of the text; None if there is nothing in it."""
        value: Any = None
        documents = 0
        for event in self.events:
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._stop(event.start_mark, "a second document begins here; one is all")
                if event.version not in (None, (1, 2)):
                    self._stop(event.start_mark, "recipes are YAML 1.2; drop the %YAML line")
            elif isinstance(event, events.NodeEvent):
                self.document.places.setdefault(self.root, self._place(event.start_mark, event))
                value = self._value(event, self.root)
        return value

    def _value(self, event: Any, path: KeyPath) -> Any:
        """The value that begins with this event."""
        if refusal := _refusal(event):
            self._note(self.document.places[path], path, refusal)
            self._skip(event)
            return UNUSABLE
        if isinstance(event, events.ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            self._stop(event.start_mark, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, events.MappingStartEvent):
            return self._mapping(path)
        return [self._entry((*path, index), item, item) for index, item in enumerate(self._inside())]

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key in self._inside():
            name = key.value if isinstance(key, events.ScalarEvent) else ""
            if problem := _refusal(key) or self._key_problem(key, (*path, name), values):
                self._note(self._place(key.start_mark), (*path, name) if name else path, problem)
                self._skip(key)
                self._skip(next(self.events))
            else:
                values[name] = self._entry((*path, name), key, next(self.events))
        return values

    def _inside(self) -> Iterator[Any]:
        """The event of each item or key in the collection that has begun; whoever takes one reads its value."""
        while not isinstance(event := next(self.events), events.CollectionEndEvent):
            yield event

    def _entry(self, path: KeyPath, key: Any, event: Any) -> Any:
        self.document.places[path] = self._place(key.start_mark, event)
        return self._value(event, path)

    def _key_problem(self, key: Any, path: KeyPath, siblings: Container[str]) -> str:
        """Why this key cannot be one of its mapping; empty if it can."""
        if not isinstance(key, events.ScalarEvent):
            return "a key is text, not a list or mapping"
        if key.implicit[0] and not isinstance(scalar(key.value), str):
            return "a key is text; put it in quotes" if key.value else "there is no key before this ':'"
        if key.value in siblings:
            line = self.document.places[path].line
            return f"is here twice{f', first on line {line}' if line else ''}; keep one"
        return ""

    def _skip(self, event: Any) -> None:
        """Pass over the rest of the value that begins with this event."""
        depth = int(isinstance(event, events.CollectionStartEvent))
        while depth:
            event = next(self.events)
            depth += isinstance(event, events.CollectionStartEvent)
            depth -= isinstance(event, events.CollectionEndEvent)

    def _note(self, place: Place, path: KeyPath, text: str) -> None:
        problems = self.document.problems
        problems.append(Problem(place, path or self.root, text))
        if len(problems) >= MAX_PROBLEMS:
            problems.append(Problem(place, self.root, "and this is where reading stops: too much is wrong"))
            raise _Stop

    def _stop(self, mark: Any, text: str) -> NoReturn:
        self.document.problems.append(Problem(self._place(mark), self.root, text))
        raise _Stop

    def _place(self, mark: Any, value: Any = None) -> Place:
        """The place of a mark, with the value there as it stands in the text (a word for what is longer)."""
        if isinstance(value, events.CollectionStartEvent):
            written = "a mapping" if isinstance(value, events.MappingStartEvent) else "a list"
        else:
            written = shorten(self.text[value.start_mark.index : value.end_mark.index]) if value else ""
        line, column = (mark.line + 1, mark.column + 1) if self.numbered and mark else (0, 0)
        return Place(self.document.source, line, column, written)

    def _parse(self) -> Iterator[Any]:
        """ruamel.yaml's events; what it raises becomes a problem with a place."""
        try:
            for count, event in enumerate(YAML(typ="safe", pure=True).parse(self.text)):
                if count > MAX_EVENTS:
                    self._stop(event.start_mark, f"more than {MAX_EVENTS} keys and values, as no recipe has")
                yield event
        except MarkedYAMLError as error:
            mark, text = _explain(error)
            self._stop(mark, f"is not valid YAML: {text}")
        except (YAMLError, ValueError, OverflowError):
            # an escape beyond Unicode, such as "\UFFFFFFFF", surfaces as chr()'s own error
            self._stop(None, "is not valid YAML")


def _refusal(event: Any) -> str:
    """Why a recipe has no use for this key or value; empty if it has."""
    if isinstance(event, events.AliasEvent) or event.anchor:
        return "anchors and aliases (& and *) are not for recipes; write the value out"
    if event.tag:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        return f"tags are not for recipes; leave {shorten(tag)} out"
    if isinstance(event, events.ScalarEvent) and SECRET.search(event.value):
        return (
            "looks like an access token or password, which a recipe would store with its run; "
            "keep it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    if isinstance(event, events.ScalarEvent) and (found := FORBIDDEN.search(event.value)):
        return f"has the character U+{ord(found.group()):04X} in it, which no setting needs"
    return ""


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
    return error.problem_mark or error.context_mark, shorten(problem, 200)  # it may quote the text
