"""Code in a base runs only with the user's consent; a recipe stored with results is never consent."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs_for_tests import finished_run
from safetensors.torch import load_file, save_file

from qlora.cli import main
from qlora.cli.chat import Plain
from qlora.errors import ModelError
from qlora.inference.chat import open_chat
from qlora.inference.load import load_trained
from qlora.merging.merge import merge
from qlora.recipe import Recipe
from qlora.report.page import render
from qlora.training.run_folder import claim

RecipeFile = Callable[..., Path]

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("executed")

class Config(LlamaConfig): pass

class Model(LlamaForCausalLM): config_class = Config

class Tokenizer(PreTrainedTokenizerFast): pass
"""


@dataclass(frozen=True)
class Stranger:
    """A base that contains code, and a run whose recipe allows the code."""

    base: Path
    run: Path
    marker: Path
    """exists once the code has run"""

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


@pytest.fixture(autouse=True)
def _code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers a temporary folder for copies of the code of bases, instead of the user's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def with_code(folder: Path, marker: Path, *, model: bool = True, tokenizer: bool = True) -> Path:
    """Add code to the model in a folder; it creates the marker file when it runs."""
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    if model:
        names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        change(folder / "config.json", auto_map=names)
    if tokenizer:
        change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    return folder


def trusting(recipe: Recipe) -> Recipe:
    """Return the recipe with `base.trust_remote_code: true`."""
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"trust_remote_code": True})})


@pytest.fixture(params=["model", "tokenizer"])
def stranger(
    request: pytest.FixtureRequest, tiny_llama: Path, recipe_file: RecipeFile, tmp_path: Path
) -> Stranger:
    base = shutil.copytree(tiny_llama, tmp_path / "stranger")
    recipe = Recipe.load(recipe_file(base={"model": str(base), "compute_dtype": "float32"}))
    run = finished_run(recipe)
    (run / "adapter" / "recipe.yaml").write_text(trusting(recipe).to_yaml())
    marker = tmp_path / "marker"
    only = {"model": request.param == "model", "tokenizer": request.param == "tokenizer"}
    with_code(base, marker, **only)
    return Stranger(base, run, marker)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `qlora` and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["qlora", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


COMMANDS: dict[str, Callable[[Stranger], list[object]]] = {
    "generate": lambda it: ["generate", it.run, "--prompt", "?", "--max-new-tokens", 1],
    "generate from the adapter": lambda it: [
        "generate", it.adapter, "--prompt", "?", "--max-new-tokens", 1, "--base",
    ],
    "eval": lambda it: ["eval", it.run],
    "eval any base": lambda it: ["eval", it.adapter, "--any-base"],
    "chat": lambda it: ["chat", it.run],
    "merge": lambda it: ["merge", it.run, "--to", it.run.parent / "merged", "--onto", "dequantized"],
    "merge onto others": lambda it: [
        "merge", it.run, "--to", it.run.parent / "merged", "--onto", "original", "--original", it.base,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_stored_with_an_adapter_runs_no_code_without_the_flag(
    stranger: Stranger, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    command = COMMANDS[name](stranger)
    assert call(monkeypatch, *command) == 4
    assert not stranger.marker.exists()
    message = capsys.readouterr().err
    assert "--trust-remote-code" in message
    assert str(stranger.base) in message
    assert not (stranger.run.parent / "merged").exists()
    assert call(monkeypatch, *command, "--trust-remote-code") == 0
    assert stranger.marker.exists()


def test_the_python_api_needs_the_same_consent(stranger: Stranger, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_trained(stranger.run)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        open_chat(str(stranger.run), {}, Plain())
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        merge(stranger.run, tmp_path / "merged", onto="dequantized")
    assert not stranger.marker.exists()
    load_trained(stranger.run, trust_remote_code=True)
    assert stranger.marker.exists()


@pytest.fixture
def whole_model(tiny_llama: Path, recipe_file: RecipeFile, tmp_path: Path) -> Stranger:
    """Write the result of full training: model/ with changed weights, code and a recipe."""
    folder = shutil.copytree(tiny_llama, tmp_path / "run" / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][:, 0] += 0.1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads(recipe_file(base={"init": "random", "quantization": "none"}).read_text())
    recipe = Recipe.from_dict({**settings, "adapter": {"method": "full"}})
    (folder / "recipe.yaml").write_text(trusting(recipe).to_yaml())
    marker = tmp_path / "marker"
    with_code(folder, marker)
    return Stranger(tiny_llama, tmp_path / "run", marker)


@pytest.mark.parametrize("command", ["generate", "eval", "chat", "extract"])
def test_a_recipe_stored_with_a_whole_model_runs_no_code_without_the_flag(
    whole_model: Stranger,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    more: list[object] = ["--prompt", "?", "--max-new-tokens", 1] if command == "generate" else []
    arguments: list[object] = [command, whole_model.run, *more]
    if command == "extract":
        to = ["--to", tmp_path / "extracted", "--rank", 2]
        arguments = ["adapter", "extract", whole_model.run, whole_model.base, *to]
    assert call(monkeypatch, *arguments) == 4
    assert not whole_model.marker.exists()
    assert "--trust-remote-code" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--trust-remote-code") == 0
    assert whole_model.marker.exists()


def places(stranger: Stranger) -> list[Path]:
    """Write the recipe everywhere it can lie among results: in a run, adapter, checkpoint or model, or deeper."""
    text = (stranger.adapter / "recipe.yaml").read_text()
    run = stranger.run
    checkpoint = run / "checkpoints" / "step-000001" / "adapter"
    elsewhere = run.parent / "elsewhere"
    folders = [run, checkpoint, stranger.base, stranger.adapter / "docs", run.parent / "bare", elsewhere]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(text)
    (run / "run.json").write_text('{"run_id": "a"}')
    (checkpoint / "adapter_config.json").write_text("{}")
    shutil.copytree(stranger.adapter, run.parent / "bare" / "adapter")  # a run without its run.json
    (elsewhere / "recipe.yaml").unlink()
    (elsewhere / "recipe.yaml").symlink_to(stranger.adapter / "recipe.yaml")
    found = [*(folder / "recipe.yaml" for folder in folders), stranger.adapter / "recipe.yaml"]
    lone = run.parent / "lone"  # a run that only its checkpoint identifies
    (lone / "checkpoints" / "step-000002").mkdir(parents=True)
    (lone / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    whole = run.parent / "whole"  # a model with a recipe in a subfolder
    (whole / "recipes").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (whole / name).touch()
    hub = run.parent / "hub"  # the layout of the hub's cache: links into a folder of contents
    for name in ("blobs", "snapshots/abc"):
        (hub / name).mkdir(parents=True)
    (hub / "snapshots/abc/adapter_config.json").touch()
    (hub / "blobs/5f").write_text(text)
    (hub / "snapshots/abc/recipe.yaml").symlink_to("../../blobs/5f")
    (run.parent / "my.yaml").symlink_to("hub/snapshots/abc/recipe.yaml")
    for file in (lone / "recipe.yaml", whole / "recipes" / "train.yaml"):
        file.write_text(text)
        found.append(file)
    return [*found, run.parent / "my.yaml"]


@pytest.mark.parametrize("command", ["train", "estimate", "profile", "data", "check"])
def test_for_a_recipe_among_results_only_an_override_is_consent(
    stranger: Stranger,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = places(stranger)
    for file in files:
        assert call(monkeypatch, command, file, f"output={tmp_path / 'new'}") == 4, file
        message = capsys.readouterr().err
        assert "base.trust_remote_code=true" in message
        assert str(stranger.base) in message
        assert f"{file}:" in message
    assert not stranger.marker.exists()
    for file in files:  # with code disabled, or with consent, it is like any other recipe
        assert call(monkeypatch, "check", file, "base.trust_remote_code=false", "--defaults") == 0
        assert call(monkeypatch, "check", file, "base.trust_remote_code=true", "--defaults") == 0
    if command == "data":  # loads only the tokenizer
        file = stranger.adapter / "recipe.yaml"
        assert call(monkeypatch, command, file, "base.trust_remote_code=true") == 0
        assert stranger.marker.exists() == (
            "Tokenizer" in (stranger.base / "tokenizer_config.json").read_text()
        )


def test_a_users_own_recipe_is_consent(stranger: Stranger, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "my.yaml"
    mine.parent.mkdir()
    mine.write_text((stranger.adapter / "recipe.yaml").read_text())
    assert Recipe.load(mine).base.trust_remote_code
    with pytest.raises(ModelError, match="trust_remote_code"):
        Recipe.load(stranger.adapter / "recipe.yaml")


def test_reading_a_run_for_its_report_or_to_resume_it_needs_no_consent(
    stranger: Stranger, tmp_path: Path
) -> None:
    recipe = trusting(Recipe.recorded(stranger.adapter / "recipe.yaml"))
    run = claim(recipe, tmp_path / "mine", resume=False, fresh=False)
    assert str(stranger.base) in render(run.path)
    assert claim(recipe, run.path, resume=True, fresh=False).run_id == run.run_id
    assert not stranger.marker.exists()


def test_the_error_for_a_base_with_code_says_how_to_allow_it(
    stranger: Stranger,
    recipe_file: RecipeFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(stranger.base / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    file = recipe_file(base={"model": str(stranger.base)})
    assert call(monkeypatch, "train", file, f"output={stranger.run.parent / 'new'}") == 4
    assert not stranger.marker.exists()
    assert "base.trust_remote_code=true" in capsys.readouterr().err
