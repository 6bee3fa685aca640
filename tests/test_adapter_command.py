"""`qlora adapter` as a newcomer uses it: on a run, as text and JSON; an error is one line and leaves no files."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import CONFIG, TENSORS, updates, write_adapter
from typer.testing import CliRunner

from qlora.cli import app, main
from qlora.inference.load import load_trained
from qlora.recipe import Recipe
from qlora.training.train import train

RecipeFile = Callable[..., Path]
LAYERS = {f"layers.{i}.{kind}": (12, 10, 6) for i in range(2) for kind in ("up", "q")}


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_compose_prints_ranks_errors_and_the_folder(tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a", LAYERS, seed=1)
    b = write_adapter(tmp_path / "b", {"layers.0.q": (12, 10, 2)}, seed=2, alpha=3)
    output = shown("compose", f"{a}:0.7", f"{b}:-0.3", "--to", tmp_path / "mix")
    q, up = (line for line in output.splitlines() if line.startswith(("q ", "up ")))
    assert (q.split()[:3], up.split()[:3]) == (["q", "2", "6-8"], ["up", "2", "6"])
    assert "rounding to float32 included; at most" in output
    assert f"wrote  {tmp_path / 'mix'}  (4 layers, 0.00 MiB)" in output
    assert "Try it" not in output, "there is no recipe to evaluate with"
    found, first, second = (updates(tmp_path / name) for name in ("mix", "a", "b"))
    expected = 0.7 * first["layers.0.q"] - 0.3 * second["layers.0.q"]
    torch.testing.assert_close(found["layers.0.q"], expected, rtol=1e-5, atol=1e-5)


def test_compose_says_that_the_terms_cancel(tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a", LAYERS, seed=1)
    cancelled = "the updates cancel each other, so the new adapter changes nothing"
    assert cancelled in shown("compose", f"{a}:1", f"{a}:-1", "--to", tmp_path / "none")
    assert cancelled not in shown("compose", f"{a}:1", f"{a}:-0.999", "--to", tmp_path / "little")


def test_json_is_one_object_with_every_layer(tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a", LAYERS, dtype=torch.bfloat16)
    output = json.loads(shown("compress", a, "--to", tmp_path / "b", "--rank", 2, "--json"))
    assert output["dtype"] == "bfloat16"
    assert output["bytes"] == (tmp_path / "b" / TENSORS).stat().st_size
    assert output["layers"].keys() == LAYERS.keys()
    squares = [torch.linalg.svdvals(update).square() for update in updates(a).values()]
    expected = (sum(s[2:].sum() for s in squares) / sum(s.sum() for s in squares)) ** 0.5
    assert output["relative_error"] == pytest.approx(expected.item(), rel=0.01)
    layer = output["layers"]["layers.0.q"]
    assert layer["relative_error"] == pytest.approx(layer["error"] / layer["norm"])
    inspected = json.loads(shown("inspect", tmp_path / "b", "--json"))
    assert inspected["verdict"]["kind"] == "may be too small"
    assert len(inspected["layers"]["layers.0.q"]["singular_values"]) == 2
    assert inspected["limits"]


def test_inspect_shows_kinds_layers_a_verdict_and_a_picture(tmp_path: Path) -> None:
    a = write_adapter(tmp_path / "a", LAYERS)
    output = shown("inspect", a, "--picture", tmp_path / "a.png")
    assert [line.split()[0] for line in output.splitlines()[1:3]] == ["q", "up"]
    assert "Rank 6 may be too small" in output
    assert "held-out" in output
    assert f"picture  {tmp_path / 'a.png'}" in output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    names = [line.split()[0] for line in shown("inspect", a, "--layers").splitlines()[1:5]]
    assert names == sorted(LAYERS)


ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}
"""tolerance between logits of the same adapter computed in two ways"""


@pytest.fixture(scope="module", params=ROUNDING)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, dtype: str) -> dict[str, Path]:
    """Return a short LoRA run on the tiny model and a short full-training run."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {
        "base": {"model": str(tiny_llama), "quantization": "none", "compute_dtype": dtype},
        "data": {
            "source": "bundled/tickets/train.jsonl",
            "format": "messages",
            "max_length": 128,
            "limit": 12,
            "held_out": 4,
        },
        "training": {"max_steps": 2, "micro_batch_size": 4, "global_batch_size": 4, "samples": 0,
                     "eval_every": None, "save_every": None, "device": "cpu"},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "tracking": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    methods: dict[str, Any] = {
        "lora": {"rank": 4, "targets": "all-linear"},
        "full": {"method": "full"},
    }
    for name, adapter in methods.items():
        recipe = Recipe.from_dict(settings | {"adapter": adapter, "output": str(folder / name)})
        train(recipe, terminal=False)
    return {name: folder / name for name in methods}


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        return load_trained(folder, device="cpu").model(ids).logits


def test_a_composed_run_gives_the_logits_of_the_run(
    runs: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    run, off = runs["lora"], ROUNDING[dtype]
    output = shown("compose", f"{run}:0.25", f"{run / 'adapter'}:0.75", "--to", tmp_path / "same")
    assert f"Try it:  qlora eval {tmp_path / 'same'}" in output
    torch.testing.assert_close(logits(tmp_path / "same"), logits(run), rtol=off, atol=off)
    shown("compose", f"{run}:1", f"{run}:-1", "--to", tmp_path / "none")
    base = load_trained(run, device="cpu", with_adapter=False).model
    with torch.no_grad():
        expected = base(torch.arange(1, 40)[None]).logits
    torch.testing.assert_close(logits(tmp_path / "none"), expected)
    assert (logits(run) - expected).abs().max() > 0.01
    first = (tmp_path / "same" / "recipe.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# Made by `qlora adapter compose {run}:0.25")


def test_a_compressed_run_gives_nearly_the_same_logits(
    runs: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    off = ROUNDING[dtype]
    shown("compress", runs["lora"], "--to", tmp_path / "whole", "--energy", 1, "--dtype", "float32")
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(runs["lora"]), rtol=off, atol=off)
    shown("compress", runs["lora"], "--to", tmp_path / "small", "--rank", 2)
    assert (tmp_path / "small" / TENSORS).stat().st_size < (runs["lora"] / "adapter" / TENSORS).stat().st_size


def test_inspect_finds_the_base_if_it_is_on_disk(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    for arguments in ((), ("--base", tiny_llama)):
        layers = json.loads(shown("inspect", runs["lora"], "--json", *arguments))["layers"]
        assert all(0 < layer["relative_norm"] < 1 for layer in layers.values())
    made_up = tmp_path / "made-up"
    shutil.copytree(runs["lora"] / "adapter", made_up)
    record = json.loads((made_up / "qlora.json").read_text())
    record["base"]["weights"] = "random of seed 0"  # as for a run with base.init=random
    (made_up / "qlora.json").write_text(json.dumps(record))
    (made_up / "manifest.json").unlink()  # it would name the changed file
    layers = json.loads(shown("inspect", made_up, "--json"))["layers"]
    assert all(layer["relative_norm"] is None for layer in layers.values())


def test_changes_of_full_training_are_extracted(
    runs: dict[str, Path], tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    to = tmp_path / "adapter"
    output = shown("extract", runs["full"], tiny_llama, "--to", to, "--rank", 64)
    assert "not captured, because an adapter of linear layers cannot hold them: " in output
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "input_layernorm.weight (2)",
        "lm_head.weight",
    ):
        assert name in output
    assert "error  1e-0" in output or "e-07 of all" in output or "e-08 of all" in output
    assert json.loads((to / CONFIG).read_text())["base_model_name_or_path"] == str(tiny_llama)
    assert Recipe.load(to / "recipe.yaml").adapter.method == "lora"
    tuned = load_trained(runs["full"], device="cpu").model
    adapted = load_trained(to, device="cpu").model
    for name in updates(to):
        layer = adapted.get_submodule(name)
        weight = layer.base.weight.float() + layer.scaling * layer.lora_b.float() @ layer.lora_a.float()
        expected = tuned.get_submodule(name).weight.float()
        torch.testing.assert_close(weight, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 10)
    again = json.loads(
        shown("extract", runs["full"], tiny_llama, "--to", tmp_path / "b", "--energy", 0.5, "--json")
    )
    assert 0.4 < again["relative_error"] < 0.71
    assert again["not_captured"]["model.norm.weight"] > 0


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no weight": (["compose", "a", "--to", "new"], 2, "'a' is not ADAPTER:WEIGHT"),
    "a comma": (["compose", "a:0,7", "--to", "new"], 2, "'a:0,7' is not ADAPTER:WEIGHT"),
    "no path": (["compose", ":1", "--to", "new"], 2, "':1' is not ADAPTER:WEIGHT"),
    "zero": (["compose", "a:0", "--to", "new"], 2, "a weight other than 0"),
    "infinite": (["compose", "a:inf", "--to", "new"], 2, "is not ADAPTER:WEIGHT"),
    "two sizes": (
        ["compress", "a", "--to", "new", "--rank", "2", "--energy", "0.9"],
        2,
        "cannot be used together",
    ),
    "no size": (["compress", "a", "--to", "new"], 2, "needs a size: add --rank 8, say, or --energy"),
    "energy": (["extract", "a", "b", "--to", "new", "--energy", "99"], 2, "at most 1, not 99"),
    "missing": (["compose", "nowhere:1", "--to", "new"], 4, "nowhere: there is no adapter"),
    "existing": (["compose", "a:1", "--to", "a"], 2, "a: already exists; choose another place, or remove it"),
    "existing too": (["compress", "a", "--to", "a", "--rank", "2"], 2, "a: already exists"),
    "existing as well": (["extract", "a", "a", "--to", "a", "--rank", "2"], 2, "a: already exists"),
    "other base": (["compose", "a:1", "b:1", "--to", "new"], 4, "different bases: some/base and other/base"),
    "other shapes": (
        ["compose", "a:1", "b:1", "--to", "new", "--any-base"],
        4,
        "their bases differ in architecture",
    ),
    "no checkpoint": (
        ["extract", "a", "b", "--to", "new", "--rank", "2"],
        4,
        "there is no model.safetensors",
    ),
    "too small a dtype": (
        ["compose", "a:1e6", "--to", "new", "--dtype", "float16"],
        4,
        "too large for float16",
    ),
    "no picture": (["inspect", "a", "--picture", "new.txt"], 2, "new.txt: a picture's name ends in"),
    "no base": (["inspect", "a", "--base", "nowhere"], 4, "nowhere: there is no such folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, code, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("a"), LAYERS)
    write_adapter(
        Path("b"),
        {"layers.0.q": (12, 11, 2), "layers.1.q": (12, 11, 2)},
        base_model_name_or_path="other/base",
    )
    monkeypatch.setattr(sys, "argv", ["qlora", "adapter", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = re.sub("^device .*\n", "", capsys.readouterr().err)
    assert exit_.value.code == code
    assert error.startswith("qlora: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert len(list((tmp_path / "a").iterdir())) == 2
