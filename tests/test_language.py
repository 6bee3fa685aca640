"""The words of the package, its documentation and its tests: plain English that is understood at the first reading."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples_for_tests import PAGES, ROOT

TESTS = [file for file in sorted((ROOT / "tests").glob("*.py")) if file != Path(__file__)]
HOOKS = sorted((ROOT / "docs/hooks").glob("*.py"))
FILES = [
    *sorted((ROOT / "qlora").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *HOOKS,
    *TESTS,
]
PAGES_OF_BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.md"))

# A first line with such a beginning names a topic, not an action.
RIDDLES = re.compile(r"(What|How|Which|Where|Whether|Who|When|Why|Of|For|From|In|To)\b")

# Words that made readers stop, each with plain replacements.
AVOIDED = {
    r"\bstands?\b(?! (?:in|for) )": "is, is stored, lies",
    r"\bstands? in memory\b": "is stored",
    r"\bbesides\b": "also, in addition",
    r"\b(?:is|are|was|were) told\b": "is reported, is shown",
    r"\bgives? up\b": "discards, recomputes",
    r"\bparted by\b": "separated by",
    r"\bgo(?:es)? on with\b": "resumes, continues",
    r"\bat its highest\b": "peak",
    r"\bof one's own\b": "own",
    r"\bnobody\b": "no one can, nothing",
    r"\b(?:whoever|lest|wherein|thereof|heeds?|heeded)\b": "a plain word",
    r"\b[Tt]he documents' (?:estimate|arithmetic)": "the rule of thumb",
}


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of modules, classes and functions, and the strings under fields, each with its line."""
    for node in ast.walk(ast.parse(file.read_text())):
        body = getattr(node, "body", ())
        for child in body if isinstance(body, list) else ():
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                text = child.value.value
                if isinstance(text, str):
                    yield child.lineno, text


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the comments and strings of a file, or the lines of a page, each with its line."""
    if file.suffix != ".py":
        yield from enumerate(file.read_text().splitlines(), 1)
        return
    wanted = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        if token.type in wanted:
            yield from enumerate(token.string.splitlines(), token.start[0])


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_first_lines_say_what_a_thing_does() -> None:
    found = [
        f"{place(file, line)}: {text.strip().splitlines()[0]}"
        for file in FILES
        for line, text in docstrings(file)
        if RIDDLES.match(text.strip())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", AVOIDED)
def test_words_are_plain(pattern: str) -> None:
    found = [
        f"{place(file, line)}: {text.strip()}"
        for file in [*FILES, *PAGES, *PAGES_OF_BENCHMARKS]
        for line, text in texts(file)
        if re.search(pattern, text)
    ]
    assert not found, f"say {AVOIDED[pattern]}:\n" + "\n".join(found)


def test_every_line_of_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        '"""What x is."""\n\n\ndef f():\n    """Of one."""\n    # it stands\n    return f"told {1}"\n'
    )
    assert [text for _, text in docstrings(file)] == ["What x is.", "Of one."]
    assert {line for line, _ in texts(file)} == {1, 5, 6, 7}
