"""Runs each example of README.md and docs/ in a short form and checks that it prints the words that the page shows."""

import ast
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import typer
from commands_for_tests import Done, qlora
from examples_for_tests import PAGES, ROOT, SHORT, Block, Command, blocks, missing_from

from qlora import errors
from qlora.cli import app
from qlora.recipe import Recipe
from qlora.recipe.loading import load

# Programs in examples that this file does not run: those of CI and of developers, and the trackers' own.
OTHER_PROGRAMS = {
    ".", "cd", "git", "pip", "pytest", "ruff", "mypy", "mkdocs", "pre-commit", ".ci/run", ".ci/oldest", ".ci/newest",
    ".ci/tested", "wandb", "tensorboard", "bash", "vllm",
}  # fmt: skip
# Many pages begin with this command; it runs once, in its short form, for all of them.
QUICKSTART = ["train", "quickstart"]
FULL_RUN = "output of the full run"
LANGUAGES = {"console", "python", "yaml", "json", "jsonl", "diff", "text", ""}
SCRIPTS = {"bash"}  # only as files; tests/test_sweeps.py runs them


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def quickstart_in(folder: Path, *overrides: str) -> tuple[Path, Done]:
    """Train the quickstart in `folder`; return the folder and what the command printed."""
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", "off")
        patch.setenv("COLUMNS", "100")
        done = qlora(*QUICKSTART, *overrides, one_stream=True)
    assert done.returncode == 0, done.stdout
    return folder, done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Return a folder with a short run in runs/quickstart, and what its command printed."""
    return quickstart_in(tmp_path_factory.mktemp("finished"), *SHORT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Return a folder with the whole quickstart in runs/quickstart, and what its command printed."""
    # the pages show what a CPU without instructions for bfloat16 prints
    return quickstart_in(tmp_path_factory.mktemp("trained"), "base.compute_dtype=float32")


@pytest.fixture
def folder(finished: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a new folder with a finished run, in which the examples of a page run."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("QLORA_CACHE", "off")
    with chdir(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("folder")
def test_the_examples_of_a_page_run(
    page: Path, finished: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all([block for block in blocks(page) if block.remark != "slow"], monkeypatch, finished[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_quickstart_prints_the_words_that_pages_show(
    trained: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    shown = [block for page in PAGES for block in blocks(page) if block.remark == FULL_RUN]
    assert shown
    for block in shown:
        for made in ("models", "small", "extracted"):  # several pages make them
            shutil.rmtree(made, ignore_errors=True)
        for command in block.commands:
            if command.arguments:
                quick = command.arguments == QUICKSTART
                done = trained[1] if quick else typed_into(command.arguments, command.typed, monkeypatch)
                missing = missing_from(done.stdout, command.printed)
                assert missing is None, f"{block.place}: no line\n  {missing}\nin\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.remark == "slow" for b in blocks(page))], ids=name_of
)
@pytest.mark.usefixtures("folder")
def test_the_slow_examples_of_a_page_run(
    page: Path, finished: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(blocks(page), monkeypatch, finished[1])


def run_all(found: list[Block], monkeypatch: pytest.MonkeyPatch, quickstart: Done | None = None) -> None:
    """Run blocks in order. `quickstart`: what a short `qlora train quickstart` printed, so that it runs only once."""
    namespace: dict[str, Any] = {}
    for block in found:
        known = block.language in LANGUAGES or (block.title and block.language in SCRIPTS)
        assert known, f"{block.place}: blocks of {block.language!r} are not tested"
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        elif block.language == "yaml":
            check_fragment(block)
        elif block.language == "python" and not block.remark.startswith("not run"):
            code = compile(block.text, block.place, "exec")
            with monkeypatch.context() as patch, warnings.catch_warnings():
                # PEFT uses a name that transformers will remove
                warnings.simplefilter("ignore", FutureWarning)
                patch.setattr(Recipe, "load", classmethod(load_shortened))
                exec(code, namespace)
        for command in block.commands if block.language == "console" else ():
            run(command, monkeypatch, quickstart)


def load_shortened(_: type[Recipe], name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe as `Recipe.load` does, in the short form unless the example sets its own number of steps."""
    own = any(override.startswith("training.max_steps=") for override in overrides)
    return load(name, [*overrides, *([] if own else SHORT)])


def run(command: Command, monkeypatch: pytest.MonkeyPatch, quickstart: Done | None) -> None:
    place, arguments = command.block.place, command.shortened
    if arguments is None:
        check_other_program(command)
    elif command.block.remark.startswith("not run: "):
        check_arguments(place, arguments)
    else:
        known = quickstart is not None and command.arguments == QUICKSTART and not command.fails
        done = quickstart if known else typed_into(arguments, command.typed, monkeypatch)
        assert done is not None
        assert bool(done.returncode) == command.fails, f"{place}: {command.text}\n{done.stdout}"
        if command.block.remark != FULL_RUN:  # the output is compared by a slow test
            missing = missing_from(done.stdout, command.printed)
            assert missing is None, (
                f"{place}: `{command.text}` does not print\n  {missing}\nbut\n{done.stdout}"
            )


def typed_into(arguments: list[str], lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Done:
    read, write = os.pipe()
    with os.fdopen(write, "w") as pipe:
        pipe.write("".join(f"{line}\n" for line in lines))
    with os.fdopen(read) as stdin, monkeypatch.context() as patch:
        patch.setattr("sys.stdin", stdin)
        return qlora(*arguments, one_stream=True)


def check_arguments(place: str, arguments: list[str]) -> None:
    """Check that the command exists and has these options, and that the recipe takes these settings."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command)
    while hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"{place}: no command {arguments[0]!r}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
        context = typer.Context(command)
    command.parse_args(context, list(arguments))
    if "recipe" in context.params:
        Recipe.load(context.params["recipe"], context.params.get("overrides") or [])


def check_other_program(command: Command) -> None:
    """Check that a benchmark exists and has these options, and that other programs are in OTHER_PROGRAMS."""
    words = [word for word in command.words if "=" not in word.partition("/")[0] or word.startswith("-")]
    place = f"{command.block.place}: {command.text}"
    if not words or words[0] in OTHER_PROGRAMS:
        return
    assert words[0] == "python", f"{place}: add `<!-- example: not run: why -->`, or a test for this program"
    if words[1] == "-m" and not words[2].startswith(("benchmarks", "qlora")):
        return  # a program of another package, such as torch.distributed.run
    target = words[2].replace(".", "/") if words[1] == "-m" else words[1]
    candidates = [ROOT / target, ROOT / f"{target}.py", ROOT / target / "__main__.py"]
    script = next((file for file in candidates if file.is_file()), None)
    assert script is not None, f"{place}: there is no such script"
    options = {
        node.value for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Constant)
    }
    wanted = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    assert set(wanted) <= options, f"{place}: unknown option {set(wanted) - options}"


def check_fragment(block: Block) -> None:
    """Check the keys and values of a part of a recipe inside a whole recipe."""
    from ruamel.yaml import YAML

    fragment = YAML(typ="safe").load(block.text)
    whole = {"base": {"model": "bundled/base"}, "data": {"source": "bundled/tickets/train.jsonl"}}
    for name, section in fragment.items():
        whole[name] = {**whole.get(name, {}), **section} if isinstance(section, dict) else section
    try:
        Recipe.from_dict(whole)
    except ValueError as error:
        pytest.fail(f"{block.place}: {error}")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    ("printed", "expected", "missing"),
    [
        ("a 1.5 GiB\nb 2\n", ["a 2.5 GiB", "b 3"], None),
        ("a 1\nb 2\nc 3\n", ["a 1", "...", "c 9"], None),
        ("step 2 loss 1.0\n", ["step 2 ..."], None),
        ("a 1\nb 2\nc 3\n", ["a 1", "c 9"], "c #"),
        ("total 5\n", ["totals 5"], "totals #"),
        ("", ["a"], "a"),
    ],
)
def test_output_is_compared_by_words(printed: str, expected: list[str], missing: str | None) -> None:
    assert missing_from(printed, expected) == missing


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```console\n$ qlora estimate quickstart --gqu 24GiB\n```\n", "No such option"),
        ("```console\n$ qlora recipes lst\n```\n", "No such command"),
        (
            "<!-- example: not run: needs a GPU -->\n```console\n$ qlora train quickstart adapter.rnk=3\n```\n",
            "rnk",
        ),
        ("```console\n$ qlora recipes list\nno such line\n```\n", "no such line"),
        ("```console\n$ python benchmarks/no_such.py\n```\n", "no such script"),
        ("```console\n$ python benchmarks/memory.py --nonsense\n```\n", "nonsense"),
        ("```yaml\ntraining: {max_stepz: 3}\n```\n", "max_stepz"),
        ("```python\nimport qlora\nqlora.no_such_name\n```\n", "no_such_name"),
        ("```sh\nls\n```\n", "not tested"),
    ],
)
def test_an_outdated_example_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr("examples_for_tests.ROOT", tmp_path)
    with pytest.raises(BaseException, match=error):
        run_all(blocks(page), monkeypatch)


def test_the_site_builds(tmp_path: Path) -> None:
    """`mkdocs build --strict` passes: no dead link, no page outside the navigation, no unknown name."""
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    recipe, commands, codes = (
        (tmp_path / f"reference/{name}/index.html").read_text()
        for name in ("recipe", "command-line", "exit-codes")
    )
    assert 'id="trainingmemory"' in recipe
    assert 'id="qlora-adapter-compose"' in commands
    for kind in [
        kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.QloraError
    ]:
        assert re.search(rf"{kind.exit_code}</td>\s*<td><code>qlora.errors.{kind.__name__}</code>", codes)


def test_the_readme_has_the_table_of_what_fits_from_its_report() -> None:
    report = (ROOT / "benchmarks/reports/will_it_fit_2026-11.md").read_text()
    table = "".join(re.findall(r"^\|.*\n", report, re.M))
    assert table.count("\n") == 5
    assert table in (ROOT / "README.md").read_text()
