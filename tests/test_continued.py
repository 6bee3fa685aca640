"""Runs that continue an adapter (`adapter.from`), ours or PEFT's, on a base in NF4 or not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_for_tests import logits, tiny
from peft import LoraConfig, get_peft_model
from runs_for_tests import finished_run, stop_after
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from qlora.adapter import lora_layers, trainable_parameters
from qlora.errors import QloraError
from qlora.inference.load import held_out_loss, load_trained
from qlora.memory.architecture import architecture
from qlora.memory.forecast import forecast
from qlora.memory.workload import assumed
from qlora.model.prepare import build, continue_adapter
from qlora.model.tokens import tokenizer_of
from qlora.recipe import Recipe
from qlora.training.check import check
from qlora.training.result import TrainResult
from qlora.training.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("without_forecast"),
]
RecipeFile = Callable[..., Path]
TENSORS = "adapter_model.safetensors"
MIXED = {
    "adapter": {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.1,
        "targets": ["q_proj", "down_proj", "layers.0.mlp.up_proj"],
        "rank_pattern": {"layers.1.*q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    }
}
"""an adapter whose layers differ in all that they can differ in"""


def run(file: Path, *overrides: str, **options: Any) -> TrainResult:
    return train(Recipe.load(file, overrides), terminal=False, **options)


def continued(recipe: Recipe) -> tuple[Any, list[str]]:
    """Return the model of a run that continues an adapter before its first step, and the remarks on it."""
    model, _ = build(recipe, "cpu")
    return model, continue_adapter(model, recipe, tokenizer_of(recipe))


def error_of(file: Path, *overrides: str) -> str:
    """Return the message of a run, which a check gives too."""
    recipe = Recipe.load(file, [*overrides, f"output={file.parent / 'refused'}"])
    with pytest.raises(QloraError) as found:
        train(recipe, terminal=False)
    with pytest.raises(QloraError) as checked:
        check(recipe)
    assert str(checked.value) == str(found.value)
    return str(found.value)


@pytest.fixture
def first(recipe_file: RecipeFile, tmp_path: Path) -> Path:
    """Return the folder of a finished run with `MIXED`, made without training."""
    return finished_run(Recipe.load(recipe_file(**MIXED), [f"output={tmp_path / 'first'}"]), size=0.05)


def test_a_run_starts_where_the_run_that_it_continues_ended(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(**MIXED)
    before = run(file, "training.max_steps=2", "optimizer.lr=0.02", f"output={tmp_path / 'first'}")
    after = run(file, f"adapter.from={before.run}", "adapter.dropout=0", "optimizer.lr=0.02")
    assert before.loss_before is not None
    assert after.loss_before == before.loss_after != before.loss_before
    one, two = (json.loads((r.run / "adapter/adapter_config.json").read_text()) for r in (before, after))
    assert (one["lora_dropout"], two["lora_dropout"]) == (0.1, 0.0)
    assert {**one, "lora_dropout": 0.0} == two
    assert not torch.equal(*(load_file(r.run / "adapter" / TENSORS).popitem()[1] for r in (before, after)))


def test_a_killed_run_needs_the_adapter_no_more_and_ends_bit_for_bit(
    recipe_file: RecipeFile, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, start = recipe_file(), (f"adapter.from={first}", "adapter.dropout=0.2")
    whole = run(file, *start, f"output={tmp_path / 'whole'}")
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert run(file, *start).result is None
    shutil.rmtree(first)
    resumed = run(file, *start, resume=True)
    assert (resumed.run / "adapter" / TENSORS).read_bytes() == (whole.run / "adapter" / TENSORS).read_bytes()
    assert f"from: {first}" in (resumed.run / "adapter/recipe.yaml").read_text()
    assert resumed.loss_before == whole.loss_before


@pytest.mark.parametrize("rounded", [True, False])
def test_an_adapter_of_peft_continues_with_its_logits(
    recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path, rounded: bool
) -> None:
    settings = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=r".*(q_proj|1\.mlp\.up_proj)",
        rank_pattern={"up_proj": 3}, lora_dropout=0.05, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny(tiny_llama), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
                parameter.copy_(parameter.bfloat16() if rounded else parameter)
    model.save_pretrained(tmp_path / "peft")
    recipe = Recipe.load(recipe_file(), [f"adapter.from={tmp_path / 'peft'}", "base.quantization=none"])
    ours, notes = continued(recipe)
    assert {name: layer.rank for name, layer in lora_layers(ours).items()} == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.mlp.up_proj": 3,
    }
    assert {parameter.dtype for parameter in trainable_parameters(ours).values()} == {torch.bfloat16}
    torch.testing.assert_close(
        logits(ours), logits(model), rtol=0, atol=2e-5 if rounded else 0.02 * logits(model).abs().max().item()
    )
    assert ("rounded to bfloat16, they change by 0." in notes[1]) is not rounded
    assert "3 layers of lora, rank 3 to 4" in notes[1]
    assert notes == [
        f"the adapter records only the name of its base, {tiny_llama}, so the weights of both bases cannot be compared",
        f"continues {tmp_path / 'peft'}: {notes[1].partition(': ')[2]}",
        "adapter.dropout is 0; the adapter was trained with 0.05",
    ]


def test_an_adapter_of_a_16_bit_base_continues_on_nf4(recipe_file: RecipeFile, tmp_path: Path) -> None:
    plain = Recipe.load(recipe_file(**MIXED), ["base.quantization=none", f"output={tmp_path / 'first'}"])
    recipe = Recipe.load(recipe_file(), [f"adapter.from={finished_run(plain)}"])
    model, notes = continued(recipe)
    said = "the adapter was trained on a base in another precision: none, now nf4 in blocks of 64, double quantization"
    assert said in notes
    assert check(recipe).notes == notes
    stored = load_file(tmp_path / "first/adapter" / TENSORS)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_b, stored[f"base_model.model.{name}.lora_B.weight"])
        assert layer.base.weight.dtype == torch.uint8
    assert len(lora_layers(model)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "bitfit"])
def test_other_methods_continue_too(recipe_file: RecipeFile, tmp_path: Path, method: str) -> None:
    file = recipe_file(adapter={"rank": 4} if method == "dora" else None)
    recipe = Recipe.load(file, [f"adapter.method={method}", f"output={tmp_path / 'first'}"])
    before = train(recipe, terminal=False)
    after = run(file, f"adapter.method={method}", f"adapter.from={before.run}")
    assert after.loss_before == before.loss_after != before.loss_before


def test_modules_and_tokens_beside_the_adapter_continue(recipe_file: RecipeFile, tmp_path: Path) -> None:
    adapter = {"rank": 4, "targets": ["q_proj"], "train_modules": ["norm"], "train_tokens": ["a"]}
    recipe = Recipe.load(recipe_file(adapter=adapter), [f"output={tmp_path / 'first'}", "optimizer.lr=0.02"])
    before = train(recipe, terminal=False)
    file, start = recipe_file(), f"adapter.from={before.run}"
    given = [start, "adapter.train_tokens=[a]"]
    assert run(file, *given).loss_before == before.loss_after != before.loss_before
    model, _ = continued(Recipe.load(file, given))
    names = [name for name in trainable_parameters(model) if "lora" not in name]
    assert names == ["model.embed_tokens.values", "model.norm.weight", "lm_head.values"]
    assert "name the same tokens here" in error_of(file, start)
    said = "brings the modules that are trained beside it (model.norm); leave"
    assert said in error_of(file, *given, "adapter.train_modules=[norm]")
    given = [start, "adapter.train_tokens=[the]", f"output={tmp_path / 'other'}"]
    with pytest.raises(QloraError, match="other tokens or modules"):
        run(file, *given)


@pytest.mark.slow
def test_pissa_continues_on_the_base_that_it_changed(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(adapter={"rank": 2, "targets": ["q_proj"], "init": "pissa"})
    before = run(file, f"output={tmp_path / 'first'}", "optimizer.lr=0.02")
    file, start = recipe_file(), f"adapter.from={before.run}"
    assert check(Recipe.load(file, [start])).notes == [
        f"continues {before.run / 'adapter'}: 2 layers of lora, rank 2"
    ]
    after = run(file, start)
    assert after.loss_before == before.loss_after != before.loss_before
    trained = load_trained(after.run, device="cpu")
    assert held_out_loss(trained)[0] == pytest.approx(after.loss_after, rel=1e-5)


def test_the_forecast_is_that_of_a_new_adapter_with_the_same_layers(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(tmp_path / "deep")  # fmt: skip
    base = {"model": str(tmp_path / "deep"), "init": "synthetic"}
    new = Recipe.load(recipe_file(base=base), [f"output={tmp_path / 'first'}"])
    same = Recipe.load(recipe_file(base=base), [f"adapter.from={finished_run(new)}"])
    found = [forecast(one, assumed(one), architecture(one, cuda=False), cuda=False) for one in (new, same)]
    assert found[0].total_bytes == found[1].total_bytes
    assert found[0].trained_parameters == found[1].trained_parameters > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"has model\.layers\..*, and this base has no such layers"),
        (["adapter.from=nowhere"], "adapter.from: nowhere: no adapter here"),
        (["adapter.method=dora"], "is an adapter of lora, so set it to lora"),
        (["output={first}"], "adapter that it continues"),
        (["output={first}/.."], "adapter that it continues"),
        (["adapter.train_tokens=[a]"], "has no tokens that were trained beside it; leave this key out"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_continue_is_refused(
    recipe_file: RecipeFile, first: Path, overrides: list[str], message: str
) -> None:
    if not overrides:
        LlamaConfig(
            vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        ).save_pretrained(first.parent / "shallow")
        overrides = [f"base.model={first.parent / 'shallow'}", "base.init=random"]
    given = [f"adapter.from={first}", *(text.format(first=first) for text in overrides)]
    recipe = Recipe.load(recipe_file(), given)
    with pytest.raises(QloraError, match=message):
        train(recipe, fresh=True, terminal=False)
    assert first.is_dir()


def test_an_adapter_of_another_base_or_a_damaged_one_is_refused(
    recipe_file: RecipeFile, first: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    file = recipe_file()
    found = error_of(file, f"adapter.from={first}", f"base.model={other}")
    assert "they differ in weights" in found
    tensors = load_file(first / "adapter" / TENSORS)
    shape = dict(tensors)
    name = next(iter(shape))
    shape[name] = shape[name][:, :-1].contiguous()
    save_file(shape, first / "adapter" / TENSORS)
    assert "the model needs" in error_of(file, f"adapter.from={first}")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, first / "adapter" / TENSORS)
    assert "not finite" in error_of(file, f"adapter.from={first}")
    tensors[name][0, 0] = 0
    save_file({**tensors, "base_model.model.other": torch.ones(2)}, first / "adapter" / TENSORS)
    assert "base_model.model.other" in error_of(file, f"adapter.from={first}")


@pytest.mark.parametrize("key", ["rank=2", "targets=attention", "alpha=3", "init=pissa", "scaling=alpha"])
def test_settings_that_the_adapter_brings_are_refused_beside_it(recipe_file: RecipeFile, key: str) -> None:
    given = {"from": "runs/first", **dict([key.split("=")])}
    given = {name: int(value) if value.isdecimal() else value for name, value in given.items()}
    file = recipe_file()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "adapter": given}))
    with pytest.raises(
        QloraError, match=rf"adapter\.{key.partition('=')[0]}: has no effect with adapter.from"
    ):
        Recipe.load(file)


def test_methods_that_cannot_continue_say_so(recipe_file: RecipeFile) -> None:
    with pytest.raises(QloraError, match=r"adapter\.from: is empty"):
        Recipe.load(recipe_file(), ["adapter.from="])
    none = "has no effect with adapter.method: full"
    for method, message in (("vera", "vera cannot"), ("adalora", "adalora cannot"), ("full", none)):
        given = ["adapter.from=runs/first", f"adapter.method={method}", "base.quantization=none"]
        with pytest.raises(QloraError, match=message):
            Recipe.load(recipe_file(), given)
