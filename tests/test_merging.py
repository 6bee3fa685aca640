"""`qlora merge` as a user runs it: the verdict, the choice, and errors that leave no files behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_for_tests import finished_run
from typer.testing import CliRunner

import qlora
from qlora import cli
from qlora.data import encode_prompt
from qlora.errors import DataError, ModelError, QloraError, UsageError
from qlora.inference.generate import answer
from qlora.inference.load import load_trained
from qlora.merging.merge import merge
from qlora.recipe import Recipe

RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Recipe:
    return Recipe.load(recipe_file(base={"compute_dtype": "float32"}))


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["merge", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_auto_judges_every_choice_and_keeps_one(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    stages: list[str] = []
    on_disk: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        stages.append(what)
        on_disk.append(sum(path.is_dir() for path in (tmp_path / "new" / ".tmp-m").iterdir()))

    merged = qlora.merge(run, tmp_path / "new" / "m", progress=progress)
    assert max(on_disk) == 2  # the best so far and the next one, as the check of free space assumes
    names = ["original", "dequantized", "nf4"]
    assert [one.name for one in merged.judged] == names
    expected = [
        "running base + adapter",
        *(f"{doing} {name}" for name in names for doing in ("writing", "comparing")),
    ]
    assert list(dict.fromkeys(stages)) == expected
    kl = {one.name: one.kl for one in merged.judged}
    assert kl["dequantized"] < 1e-4 < kl["original"]
    assert kl["dequantized"] < kl["nf4"]
    assert merged.live is not None
    assert merged.live.kl < 1e-9
    assert merged.onto == "dequantized"  # 16 bits, although NF4 costs less than 1% of perplexity here
    assert "nf4, in " in merged.why
    record = json.loads((tmp_path / "new" / "m" / "merge.json").read_text())
    assert record["onto"] == merged.onto
    assert record["base"] == recipe.base.model
    assert record["judged"][1] == merged.judged[1].as_json()
    # only the chosen form is left, and no draft
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m"]
    weights = sum(file.stat().st_size for file in (tmp_path / "new" / "m").glob("*.safetensors"))
    assert merged.weight_bytes < weights < merged.weight_bytes + 20_000  # plus the headers


def test_the_merged_model_gives_the_logits_of_the_live_one(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe, size=1.0)
    invoke(str(run), "--to", str(tmp_path / "m"), "--onto", "dequantized")
    live = load_trained(run)
    ids = encode_prompt("My lamp broke.", recipe.data, live.tokenizer)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    question = [{"role": "user", "content": "My lamp broke."}]
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"] == ids
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert answer(plain, tokenizer, ids, 8) == answer(live.model, live.tokenizer, ids, 8)
    assert answer(plain, tokenizer, ids, 8)


def test_the_command_prints_the_verdict_and_the_choice(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    shown = invoke(str(run), "--to", str(tmp_path / "a"), "--onto", "nf4")
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["merged", "onto", "KL,", "nats", "perplexity", "same", "top-1", "weights,", "MiB"] in lines
    assert [line[0] for line in lines if line[0] in ("(live)", "nf4")] == ["(live)", "nf4"]
    assert "nf4: as asked" in shown
    printed = json.loads(invoke(str(run), "--to", str(tmp_path / "b"), "--onto", "nf4", "--json"))
    assert printed["folder"] == str(tmp_path / "b")
    assert printed["judged"][0]["kl"] > 0
    assert printed["tokens"] > 0
    unjudged = invoke(str(run), "--to", str(tmp_path / "c"), "--onto", "nf4", "--tokens", "0")
    assert "KL" not in unjudged
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert same[0] == same[1] == same[2]


def test_held_out_text_comes_from_the_recipe_or_a_file_up_to_a_limit(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    rows = Path(qlora.__file__).parent / "bundled" / "tickets" / "held_out.jsonl"
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    few.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    many.write_text("".join(rows.read_text().splitlines(keepends=True)[:40]))

    def tokens(**settings: Any) -> int:
        merged = merge(run, tmp_path / f"m{len(list(tmp_path.iterdir()))}", onto="nf4", **settings)
        return merged.tokens

    own = tokens()
    assert own > 0
    three = tokens(data=str(few))
    assert three > 0
    assert three != own
    assert tokens(data=str(many)) > 10 * three
    assert 50 <= tokens(data=str(many), max_tokens=50) < 200
    with pytest.raises(DataError, match=r"^--data: 'gone\.jsonl': No such file"):
        tokens(data="gone.jsonl")
    gone = run / "adapter/recipe.yaml"
    gone.write_text(gone.read_text().replace("bundled/tickets/train.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match=r"^data\.source: 'gone\.jsonl': No such file"):
        tokens()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"onto": "auto", "max_tokens": 0}, UsageError, "--tokens must be above 0"),
        ({"data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"original": "./nowhere"}, ModelError, "no folder './nowhere'"),
    ],
)
def test_wrong_settings_leave_nothing(
    recipe: Recipe, tmp_path: Path, settings: dict[str, Any], error: type[QloraError], said: str
) -> None:
    run = finished_run(recipe)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=said):
        merge(run, tmp_path / "m", **settings)
    assert sorted(tmp_path.iterdir()) == before


def test_folders_and_results_that_cannot_be_merged_are_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(recipe)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    before = sorted(tmp_path.iterdir())

    def refused(adapter: Path, said: str, code: int = 4, **settings: Any) -> None:
        with pytest.raises(QloraError, match=said) as caught:
            merge(adapter, tmp_path / "m", **{"onto": "original", "max_tokens": 0, **settings})
        assert caught.value.exit_code == code
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before

    with pytest.raises(UsageError, match="there: already exists"):
        merge(run, tmp_path / "there")
    refused(tmp_path / "there", "no trained adapter here")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
        refused(run, r"needs 0.0 GiB of disk space there, and 0.0 GiB are free", code=74)
    data = {"source": recipe.data.source, "format": "messages"}
    for changes, said, code in [
        ({"base": {"quantization": "none"}, "adapter": {"method": "full"}}, "all weights were trained", 4),
        ({"base": {"init": "random"}}, "made from a seed", 4),
        ({"base": {"model": "someone/absent"}}, "hub cannot be reached.*download it", 4),
        (
            {"base": {"quantization": "none"}},
            "was not quantized in training: use --onto original or --onto nf4",
            2,
        ),
    ]:
        base = {"model": recipe.base.model, **changes["base"]}
        (run / "adapter" / "recipe.yaml").write_text(json.dumps({"data": data, **changes, "base": base}))
        refused(run, said, code, onto="dequantized")


def test_an_nf4_base_needs_the_name_of_its_original(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    merge(run, tmp_path / "base", onto="nf4", max_tokens=0)
    base = recipe.base.model_copy(update={"model": str(tmp_path / "base")})
    run = finished_run(recipe.model_copy(update={"base": base, "output": str(tmp_path / "second")}))
    with pytest.raises(UsageError, match="has no 16-bit weights: give them with --original MODEL"):
        merge(run, tmp_path / "m", onto="original")
    with pytest.raises(ModelError, match="is an NF4 checkpoint too"):
        merge(run, tmp_path / "m", original=str(tmp_path / "base"))
    merged = merge(run, tmp_path / "m", original=recipe.base.model)
    assert sorted(one.name for one in merged.judged) == ["dequantized", "nf4", "original"]
    assert [one.name for one in merge(run, tmp_path / "n").judged] == ["dequantized", "nf4"]


def test_a_failure_during_a_merge_leaves_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(recipe)
    before = sorted(tmp_path.iterdir())
    left = tmp_path / ".tmp-m"
    (left / "original").mkdir(parents=True)  # left by a killed process
    monkeypatch.setattr("qlora.merging.merge.judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "m")
    assert sorted(tmp_path.iterdir()) == before
