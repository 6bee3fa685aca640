"""An adapter recognises its base by the checkpoint, however it is loaded, and refuses another base unless forced."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora import merge_adapter
from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter, trainable_parameters
from qlora.adapter.digest import SAMPLE_BYTES, WHOLE_BYTES
from qlora.adapter.identity import BaseIdentity, checkpoint_digest
from qlora.cli import app
from qlora.data import prompt_digests
from qlora.errors import ModelError
from qlora.inference.load import load_trained
from qlora.model.load import load_base, load_tokenizer
from qlora.quantization import nf4
from qlora.recipe import Base, Data, Recipe
from qlora.training import train as loop
from qlora.training.train import train


def section(model: Path | str, **settings: Any) -> Base:
    return Base(**{"model": str(model), "compute_dtype": "float32"} | settings)


def saved(base: nn.Module, folder: Path) -> BaseIdentity:
    """Save an adapter on `base` and return the identity that it records."""
    return saved_identity(adapt(base, LoraSpec(rank=2)), folder)


def change(folder: Path, name: str, by: float = 1e-3) -> Path:
    """Change one number of one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] += by
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def test_an_adapter_remembers_its_base(tiny_llama: Path, tmp_path: Path) -> None:
    found = saved(load_base(section(tiny_llama, block_size=128)), tmp_path)
    assert found.name == str(tiny_llama)
    assert found.weights == checkpoint_digest([tiny_llama / "model.safetensors"])
    assert found.quantization == "nf4 in blocks of 128, double quantization"
    record = json.loads((tmp_path / "qlora.json").read_text())
    assert record == {"base": vars(found), "format": 1}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == found.name


def reconfigure(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rms_norm_eps": 1e-3}, "architecture: rms_norm_eps: .* and 0.001"),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "rope_theta: .* and 5.0",
        ),
        ({"attention_dropout": 0.5}, "attention_dropout"),
    ],
)
def test_the_same_weights_in_another_architecture_are_another_base(
    tiny_llama: Path, copy: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    saved(load_base(section(tiny_llama)), tmp_path / "adapter")
    other = load_base(section(reconfigure(copy, **settings)))
    with pytest.raises(ModelError, match=said):
        load_adapter(other, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter", any_base=True)


def test_settings_that_compute_nothing_make_no_other_base(
    tiny_llama: Path, copy: Path, tmp_path: Path
) -> None:
    saved(load_base(section(tiny_llama)), tmp_path / "adapter")
    reconfigure(
        copy, use_cache=False, transformers_version="9.9", torch_dtype="float16", a_new_key=3, eos_token_id=7
    )
    load_adapter(load_base(section(copy)), tmp_path / "adapter")


def test_the_same_base_is_known_again(tiny_llama: Path, copy: Path, tmp_path: Path) -> None:
    """The base is recognised from another path, in another dtype, sharded, adapted or loaded by plain transformers."""
    saved(load_base(section(tiny_llama)), tmp_path / "adapter")
    load_adapter(load_base(section(copy, compute_dtype="bfloat16")), tmp_path / "adapter")
    again = load_adapter(load_base(section(copy)), tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    load_adapter(load_base(section(tmp_path / "shards")), tmp_path / "adapter")
    identity = saved(plain, tmp_path / "plain")
    assert identity.quantization == "none"
    assert identity.weights == BaseIdentity.of(again).weights
    load_adapter(load_base(section(copy, quantization="none")), tmp_path / "plain")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_another_base_is_refused_with_both_named(
    tiny_llama: Path, copy: Path, tmp_path: Path, name: str
) -> None:
    saved(load_base(section(tiny_llama)), tmp_path / "adapter")
    other = load_base(section(change(copy, name)))
    message = rf"adapter: the adapter was trained on {tiny_llama}, and this base is {copy}; they differ in weights: "
    with pytest.raises(ModelError, match=message) as error:
        load_adapter(other, tmp_path / "adapter")
    assert "--any-base" in str(error.value)
    assert error.value.exit_code == 4
    assert not lora_layers(other), "the model is unchanged"
    load_adapter(other, tmp_path / "adapter", any_base=True)


@pytest.mark.parametrize(
    ("settings", "there", "here"),
    [
        ({"quantization": "none"}, "nf4 in blocks of 64, double quantization", "none"),
        ({"block_size": 256}, "nf4 in blocks of 64, double quantization", "nf4 in blocks of 256"),
        ({"double_quant": False}, "nf4 in blocks of 64, double quantization", "nf4 in blocks of 64"),
    ],
)
def test_another_quantization_is_another_base(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], there: str, here: str
) -> None:
    saved(load_base(section(tiny_llama)), tmp_path)
    with pytest.raises(ModelError, match=f"differ in quantization: {there} and {here}"):
        load_adapter(load_base(section(tiny_llama, **settings)), tmp_path)


def test_made_up_weights_are_known_by_their_seed_and_not_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(weights: object) -> str:
        raise AssertionError("the weights of a large model would take minutes")

    for name in ("memory_digest", "checkpoint_digest"):
        monkeypatch.setattr(f"qlora.adapter.identity.{name}", read)
    assert (
        BaseIdentity.of(load_base(section(tiny_llama, init="random"), seed=3)).weights == "random of seed 3"
    )


def test_bases_without_a_checkpoint_are_identified_by_their_settings(
    tiny_llama: Path, tmp_path: Path
) -> None:
    saved(load_base(section(tiny_llama, init="random"), seed=1), tmp_path)
    load_adapter(load_base(section(tiny_llama, init="random"), seed=1), tmp_path)
    for other in ({"init": "random"}, {"init": "synthetic"}, {}):
        with pytest.raises(ModelError, match="weights: random of seed 1 and "):
            load_adapter(load_base(section(tiny_llama, **other), seed=2), tmp_path)


def network() -> nn.Module:
    return nn.ModuleDict({"up": nn.Linear(4, 4)})


def saved_identity(model: nn.Module, folder: Path) -> BaseIdentity:
    save_adapter(model, folder)
    found = BaseIdentity.read(folder)
    assert found is not None
    return found


def seeded(seed: int = 1) -> nn.Module:
    """Return a plain network with a large layer and running statistics."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 600), nn.BatchNorm1d(600), nn.Linear(600, 600), nn.Linear(600, 2))


def trained_steps(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), 0.1)
    for _ in range(2):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    return model


def test_a_plain_network_is_known_by_its_weights(tmp_path: Path) -> None:
    model = seeded().eval()
    identity = BaseIdentity.of(model)
    assert identity.weights is not None
    assert identity.weights.endswith(" (in memory)")
    adapt(model, LoraSpec(targets=["0", "2"], rank=2, dtype=torch.float32))
    assert BaseIdentity.of(model) == identity
    assert saved_identity(trained_steps(model), tmp_path) == identity
    load_adapter(seeded().eval(), tmp_path)
    again = load_adapter(seeded(), tmp_path)
    assert BaseIdentity.of(again) == identity


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "another seed": lambda m: seeded(2).state_dict(),
    "one weight": lambda m: m[0].weight.data[3, 3].add_(1e-3),
    "a buffer": lambda m: m[1].running_mean[5].add_(1e-3),
    "the last weight of a large layer": lambda m: m[2].weight.data[-1, -1].add_(1e-3),
    "dtype": lambda m: m.double(),
    "a name": lambda m: m.add_module("one more", nn.Linear(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_plain_network_is_refused(tmp_path: Path, change: str) -> None:
    saved_identity(adapt(seeded(), LoraSpec(targets=["0"], rank=2)), tmp_path)
    other = seeded()
    changed = CHANGES[change](other)
    if change == "another seed":
        other.load_state_dict(changed)
    with pytest.raises(ModelError, match=r"differ in weights: .* \(in memory\) and .* \(in memory\)"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, any_base=True)


def test_another_class_with_the_same_weights_is_another_network(tmp_path: Path) -> None:
    class Other(nn.Sequential):
        pass

    saved_identity(adapt(seeded(), LoraSpec(targets=["0"], rank=2)), tmp_path)
    with pytest.raises(ModelError, match="differ in weights"):
        load_adapter(Other(*seeded()), tmp_path)


def test_a_plain_network_in_nf4_is_known_by_its_codes(tmp_path: Path) -> None:
    def quantized(scale: float = 1.0) -> nn.Module:
        torch.manual_seed(1)
        return nn.ModuleDict({"up": nf4.NF4Linear(nf4.quantize(torch.randn(64, 64) * scale))})

    found = saved_identity(adapt(quantized(), LoraSpec(targets=["up"], rank=2)), tmp_path)
    assert found.quantization == "nf4 in blocks of 64, double quantization"
    load_adapter(quantized(), tmp_path)
    with pytest.raises(ModelError, match="differ in weights"):
        load_adapter(quantized(2.0), tmp_path)  # equal codes, other scales


def test_what_the_adapter_does_not_hold_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = adapt(seeded(), LoraSpec(targets=["0"], rank=2, dtype=torch.float32))
    with torch.no_grad():
        model.train()(torch.randn(4, 8))
    with pytest.raises(
        ModelError, match=r"1.running_mean, 1.running_var, 1.num_batches_tracked would be lost"
    ):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path, base=BaseIdentity.of(model))  # the caller says what the base is
    model = adapt(seeded(), LoraSpec(targets=["0"], rank=2))
    model[3].weight.data.add_(1)
    with pytest.raises(ModelError, match=r"3\.weight would be lost: changed since the adapter was added"):
        save_adapter(model, tmp_path)
    save_adapter(
        adapt(seeded(), LoraSpec(targets=["0"], rank=2)).double(), tmp_path
    )  # only the dtype differs


def test_a_merged_model_no_longer_has_the_identity_of_its_checkpoint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load_base(section(tiny_llama, quantization="none"))
    before = saved(model, tmp_path)
    for layer in lora_layers(model).values():
        layer.lora_b.data.fill_(0.1)
    after = BaseIdentity.of(merge_adapter(model))
    assert after.weights != before.weights
    assert after.name is None
    with pytest.raises(ModelError, match="differ in weights"):
        load_adapter(model, tmp_path)


def test_a_merged_network_is_another_base(tmp_path: Path) -> None:
    model = trained_steps(adapt(seeded().eval(), LoraSpec(targets=["0"], rank=2, dtype=torch.float32)))
    save_adapter(model, tmp_path)
    identity = BaseIdentity.of(model)
    merge_adapter(model)
    assert BaseIdentity.of(model) != identity
    with pytest.raises(ModelError, match="differ in weights"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("trained_on", "used_on", "refused"),
    [
        ("google/gemma-2b", "google/gemma-2b", False),
        ("google/gemma-2b", "google/gemma-7b", True),
        ("google/gemma-2b", "bundled/base", True),
        ("google/gemma-2b", "/models/anything", False),  # a folder's name identifies no model
        ("google/gemma-2b", None, False),
        ("gpt2", "openai-community/gpt2", False),  # old and new name on the hub
    ],
)
def test_peft_adapters_are_compared_by_base_name(
    tmp_path: Path, trained_on: str, used_on: str | None, refused: bool
) -> None:
    save_adapter(adapt(network(), LoraSpec(targets=["up"], rank=2)), tmp_path, base_model=trained_on)
    (tmp_path / "qlora.json").unlink()
    known = BaseIdentity(used_on)
    if refused:
        with pytest.raises(ModelError, match=rf"differ in name: {trained_on} and {used_on}"):
            load_adapter(network(), tmp_path, base=known)
        load_adapter(network(), tmp_path, base=known, any_base=True)
    else:
        load_adapter(network(), tmp_path, base=known)


def test_a_folder_may_look_like_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there, here = BaseIdentity("google/gemma-2b"), BaseIdentity("models/mine")
    assert there.difference(here) is not None
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert there.difference(here) is None


def test_a_model_without_weights_has_no_known_quantization() -> None:
    with torch.device("meta"):
        meta_base = nn.ModuleDict({"x": nf4.Linear4bit(64, 64)})
    assert BaseIdentity.of(meta_base).quantization is None


def test_unknown_fields_are_not_compared() -> None:
    known = BaseIdentity("a/b", None, None, "w", "none", "t", "c")
    assert known.difference(known) is None
    for key in ("weights", "quantization", "tokenizer", "template"):
        assert known.difference(replace(known, **{key: None})) is None
        assert known.difference(replace(known, **{key: "x"})) == f"{key}: {getattr(known, key)} and x"
    assert known.difference(replace(known, name="c/d")) is None, "the same weights are the same base"
    assert known.difference(replace(known, name="c/d", weights=None)) == "name: a/b and c/d"
    assert str(replace(known, commit="0123456789abcdef", revision="main")) == "a/b@0123456789ab"


def large(folder: Path, **tensors: torch.Tensor) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return checkpoint_digest([folder / "model.safetensors"])


def test_the_digest_of_a_large_tensor_samples_it(tmp_path: Path) -> None:
    """The digest detects and misses exactly the changes that its documentation lists as detected and missed."""
    big = torch.zeros(WHOLE_BYTES + 4096, dtype=torch.uint8)
    before = large(tmp_path, big=big)
    for place, seen in ((0, True), (-1, True), (SAMPLE_BYTES - 1, True), (SAMPLE_BYTES, False)):
        changed = big.clone()
        changed[place] = 1
        assert (large(tmp_path, big=changed) != before) == seen, place
    whole = torch.zeros(WHOLE_BYTES, dtype=torch.uint8)
    before = large(tmp_path, whole=whole)
    whole[SAMPLE_BYTES] = 1
    assert large(tmp_path, whole=whole) != before


def test_the_digest_covers_names_dtypes_and_shapes(tmp_path: Path) -> None:
    zeros = torch.zeros(4, 6)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(6, 4)},
        {"a": zeros.view(torch.int32)},
        {"a": zeros, "b": torch.zeros(0)},
    ]
    assert len({large(tmp_path, **tensors) for tensors in variants}) == len(variants)


def test_a_damaged_checkpoint_gives_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged"):
        checkpoint_digest([tmp_path / "model.safetensors"])


def test_prompting_is_the_vocabulary_and_the_template(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(section(tiny_llama))
    data = Data(source="x", format="messages")
    first = prompt_digests(data, tokenizer)
    assert prompt_digests(data, load_tokenizer(section(tiny_llama))) == first
    other = prompt_digests(data.model_copy(update={"template": "plain"}), tokenizer)
    assert (other["tokenizer"], other["template"] != first["template"]) == (first["tokenizer"], True)
    raw = [
        prompt_digests(Data(source="x", format=kind), tokenizer)
        for kind in ("completion", "prompt-completion")
    ]
    assert raw[0] == raw[1] != first
    tokenizer.add_tokens(["<new>"])
    assert prompt_digests(data, tokenizer)["tokenizer"] != first["tokenizer"]


# Whole runs

RecipeFile = Callable[..., Path]


@pytest.mark.usefixtures("without_forecast")
def test_a_run_whose_base_has_changed_is_refused(recipe_file: RecipeFile, copy: Path) -> None:
    file = recipe_file(base={"model": str(copy)}, training={"max_steps": 1})
    run = train(Recipe.load(file), terminal=False).run
    load_trained(run)
    change(copy, "model.norm.weight")
    result = CliRunner().invoke(app, ["eval", str(run)])
    assert isinstance(result.exception, ModelError)
    assert result.exception.exit_code == 4
    assert f"{copy}; they differ in weights" in str(result.exception)
    assert CliRunner().invoke(app, ["eval", str(run), "--any-base"]).exit_code == 0
    assert CliRunner().invoke(app, ["generate", str(run), "--prompt", "?", "--any-base"]).exit_code == 0
    assert CliRunner().invoke(app, ["eval", str(run), "--base"]).exit_code == 0, "--base needs no check"


@pytest.mark.usefixtures("without_forecast")
def test_a_run_whose_template_has_changed_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template.write_text(text)
    file = recipe_file(data={"template": str(template)}, training={"max_steps": 1})
    run = train(Recipe.load(file), terminal=False).run
    load_trained(run)
    template.write_text(text.replace(": ", " - "))
    with pytest.raises(ModelError, match="differ in template"):
        load_trained(run)


@pytest.mark.usefixtures("without_forecast")
def test_a_run_is_not_resumed_on_another_base(
    recipe_file: RecipeFile, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(base={"model": str(copy)}, training={"max_steps": 2, "save_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_result", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            train(Recipe.load(file), terminal=False)
    change(copy, "model.norm.weight", by=0.5)
    with pytest.raises(
        ModelError, match=r"the base differs from that of this checkpoint in weights: .*--fresh"
    ):
        train(Recipe.load(file), resume=True, terminal=False)
