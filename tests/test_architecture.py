"""The rooms of the package as data: imports point one way, and each room opens only its own libraries.

A file imports only from rooms with a lower number than its own; files of one package directory may import each other.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qlora"

ROOMS = [
    {"errors"},
    {"formats"},
    {"recipe"},
    {"bundled"},
    {"storage"},
    {"runtime"},
    {"kernels"},
    {"data", "optim", "tracking"},
    {"quantization"},
    {"ops"},
    {"adapter"},
    {"model"},
    {"objective"},
    {"memory"},
    {"inference"},
    {"merging"},
    {"export"},
    {"serving"},
    {"report"},
    {"training"},
    {"cli"},
]
RANK = {name: number for number, names in enumerate(ROOMS) for name in names}

# Rooms with the same number must not import each other, with these exceptions.
SAME_ROOM: set[tuple[str, str]] = set()

# Libraries that only these rooms may import. All other libraries are free.
DOORS = {
    "bitsandbytes": {"runtime"},
    "wandb": {"tracking"},
    "tensorboard": {"tracking"},
    "pydantic": {"recipe"},
    "ruamel": {"recipe"},
    "datasets": {"data"},
    "accelerate": {"runtime"},
    "triton": {"kernels"},
    "gguf": {"export"},
    "typer": {"cli"},
    "matplotlib": {"report"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "lm_eval": {"inference"},
    "peft": set(),
    "pickle": set(),
}
# Rooms and files that never import torch, so that a mistake in a recipe is reported at once.
WITHOUT_TORCH = (
    "errors", "formats", "recipe", "bundled", "report", "cli", "storage/atomic", "storage/folders", "storage/manifest",
    "storage/cache", "tracking", "runtime/signals", "runtime/streams", "training/run_folder",
)  # fmt: skip

# Words that only one file may use, because only that file may know their meaning.
KNOWN_IN = {
    "_subclasses": "runtime/fake.py",  # torch._subclasses: FakeTensorMode
    "record_function": "runtime/phases.py",
}

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def files() -> list[Path]:
    found = sorted(p for p in PACKAGE.rglob("*.py") if "_recipes" not in p.parts)
    assert len(found) > 20
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def without_torch(path: Path) -> bool:
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return any(name == place or name.startswith(f"{place}/") for place in WITHOUT_TORCH)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import in the file, at any depth, except imports for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module == "qlora":
                yield from ((node.lineno, f"qlora.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def test_every_room_is_in_the_table() -> None:
    rooms = {room_of(path) for path in files()} - {"__init__", "__main__"}
    assert rooms == set(RANK)
    flat = {path.name for path in PACKAGE.glob("*.py")}
    assert flat == {"__init__.py", "__main__.py", "errors.py"}, "files must lie in a room"


def test_imports_point_down() -> None:
    wrong = []
    for path in files():
        own = room_of(path)
        if own in {"__init__", "__main__"}:
            continue
        for line, module in imports(path):
            head = module.split(".")[1] if module.startswith("qlora.") else own
            if head != own and RANK[head] >= RANK[own] and (own, head) not in SAME_ROOM:
                wrong.append(f"{path.name}:{line}: {own} -> {head}")
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_in_their_file() -> None:
    """Private names are neither imported by name nor reached through the module."""
    wrong = []
    for path in files():
        tree = ast.parse(path.read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qlora":
                modules |= {alias.asname or alias.name for alias in node.names}
                wrong += [f"{path.name}:{node.lineno}: {a.name}" for a in node.names if a.name[0] == "_"]
        wrong += [
            f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr)
            if ast.unparse(node.value) in modules
        ]
    assert not wrong, "\n".join(wrong)


def test_libraries_are_opened_by_their_rooms_only() -> None:
    wrong = [
        f"{path.name}:{line}: {room_of(path)} imports {module}"
        for path in files()
        for line, module in imports(path)
        if room_of(path) not in DOORS.get(module.split(".")[0], {room_of(path)})
        or (module.split(".")[0] == "torch" and without_torch(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_there_is_one_backward() -> None:
    found = [path.name for path in files() for _ in re.findall(r"\.backward\(", path.read_text())]
    assert found == ["step.py"]


@pytest.mark.parametrize(("word", "file"), KNOWN_IN.items())
def test_words_stay_in_their_file(word: str, file: str) -> None:
    pattern = re.compile(rf"\b{word}\b")
    found = [path.relative_to(PACKAGE).as_posix() for path in files() if pattern.search(path.read_text())]
    assert found == [file]


def test_recorded_recipes_are_read_only_where_they_load_nothing() -> None:
    """Code that loads a base by a recipe stored with results must ask `recipe_of`, which asks for consent."""
    found = {path.relative_to(PACKAGE).as_posix() for path in files() if ".recorded(" in path.read_text()}
    read = {
        "training/run_folder.py",
        "report/page.py",
        "report/run_files.py",
        "inference/load.py",
        "export/hub.py",
    }
    assert found == read


def test_no_catch_all_modules_and_no_hidden_code() -> None:
    assert not [path for path in files() if path.stem in FORBIDDEN_NAMES]
    wrong = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name in {"torch.load", "yaml.load", "os.system"}:
                wrong.append(f"{path.name}:{node.lineno}: {name}")
            if any(k.arg == "shell" for k in node.keywords):
                wrong.append(f"{path.name}:{node.lineno}: shell=")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in files():
        text = path.read_text()
        if text.count("\n") > 400:
            wrong.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                wrong.append(f"{path.name}:{node.lineno}: {node.name} is longer than 60 lines")
    assert not wrong, "\n".join(wrong)


def test_public_names_exist_and_are_documented() -> None:
    import qlora

    assert qlora.__all__ == sorted(qlora.__all__)
    assert 10 <= len(qlora.__all__) <= 18
    for name in qlora.__all__:
        assert ">>>" in (getattr(qlora, name).__doc__ or ""), f"{name} has no example in its docstring"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qlora.nonsense


@pytest.mark.parametrize("statement", ["import qlora", "import qlora.recipe", "import qlora.cli"])
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    heavy = "('torch', 'transformers', 'datasets', 'wandb', 'matplotlib')"
    code = f"{statement}; import sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
