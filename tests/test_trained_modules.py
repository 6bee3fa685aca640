"""Whole modules trained beside an adapter, such as norms and heads: stored as in PEFT, and never lost in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import recipe
from commands_for_tests import qlora
from test_memory_forecast import assert_right, foreseen, measured
from test_trained_tokens import IDS, as_batch, tiny
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from qlora.adapter import (
    Adapters,
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    trainable_parameters,
)
from qlora.adapter.merge import merge_adapter
from qlora.adapter.methods import ADAPTERS
from qlora.adapter.trained_parts import trained_parts, whole_parameters
from qlora.errors import ModelError, UsageError
from qlora.inference.load import held_out_loss, load_trained
from qlora.memory.workload import assumed
from qlora.model.decoder_layer import FusedLayer, use_fused_layers
from qlora.model.load import load_base
from qlora.model.prepare import apply_adapter, build, part_notes
from qlora.objective.causal_lm import loss_sum
from qlora.recipe import Recipe
from qlora.training import train as loop
from qlora.training.train import train

RecipeFile = Callable[..., Path]


def changed(model: nn.Module) -> nn.Module:
    """Change every trained parameter of a model by random numbers."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def adapted(model: nn.Module, modules: list[str], **settings: Any) -> nn.Module:
    return adapt(model, LoraSpec(**{"rank": 2, "dtype": torch.float32, **settings}), train_modules=modules)


class Classifier(nn.Module):
    """A plain network: two linears, a norm with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu())


@pytest.mark.parametrize("entry", ["norm", r"model\.norm", "model.norm"])
def test_a_module_is_named_by_its_last_parts_or_an_expression(entry: str) -> None:
    model = adapted(tiny(), [entry])
    trained = {name for name in trainable_parameters(model) if "lora" not in name}
    assert trained == {"model.norm.weight"}


def test_what_cannot_be_trained_as_a_whole_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r'train_modules: "score" matches no module .*: embed_tokens \(1\), '
    ):
        adapted(tiny(), ["score"])
    with pytest.raises(UsageError, match="not a valid regular expression"):
        adapted(tiny(), ["("])
    with pytest.raises(ModelError, match=r"self_attn\.q_proj is a target of the adapter"):
        adapted(tiny(), ["q_proj"], targets=["q_proj", "v_proj"])
    with pytest.raises(ModelError, match=r"lm_head shares its weight with model\.embed_tokens"):
        adapted(tiny(tied=True), ["lm_head"])


@pytest.mark.parametrize("key", ["targets", "train_modules"])
def test_a_recipe_s_message_names_the_key_with_its_section(recipe_file: RecipeFile, key: str) -> None:
    recipe = Recipe.load(recipe_file(), [f"adapter.{key}=[q_prj]"])
    with pytest.raises(UsageError, match=rf'^adapter\.{key}: "q_prj" matches no'):
        train(recipe, terminal=False)


def test_all_linear_leaves_out_what_is_inside_a_trained_module() -> None:
    model = adapted(tiny(), ["mlp"])
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    trained = [name for name in trainable_parameters(model) if "lora" not in name]
    assert len(trained) == 3 * len(model.model.layers)
    assert all(".mlp." in name for name in trained)


@pytest.mark.parametrize("method", [method.name for method in ADAPTERS])
def test_a_run_without_a_layer_to_adapt_is_refused(recipe_file: RecipeFile, method: str) -> None:
    made = Recipe.load(recipe_file(adapter={"targets": "attention", "train_modules": ["self_attn"]}))
    made = made.model_copy(update={"adapter": made.adapter.model_copy(update={"method": method})})
    with pytest.raises(UsageError, match="takes every layer of targets=attention, so no layer is left"):
        apply_adapter(tiny(), made)


@pytest.mark.parametrize("init", ["pissa", "kaiming"])
def test_a_trained_module_keeps_its_weight_at_the_start(
    tiny_llama: Path, recipe_file: RecipeFile, init: str
) -> None:
    adapter = {"init": init, "train_modules": ["down_proj"]}
    made = Recipe.load(
        recipe_file(base={"quantization": "none", "compute_dtype": "float32"}, adapter=adapter)
    )
    model, name = build(made, "cpu")[0], "model.layers.0.mlp.down_proj"
    expected = load_base(made.base).get_parameter(f"{name}.weight")
    assert torch.equal(model.get_parameter(f"{name}.weight"), expected)
    plain = adapted(load_base(made.base), ["down_proj"], init=init, targets="all-linear")
    assert torch.equal(plain.get_parameter(f"{name}.weight"), expected)
    assert lora_layers(plain).keys() == lora_layers(model).keys()
    assert name not in lora_layers(model)


@pytest.mark.parametrize("modules", [["nope"], ["second"]])
def test_a_failed_adapt_leaves_the_base_unchanged(modules: list[str]) -> None:
    model = Classifier()
    with pytest.raises((UsageError, ModelError), match="train_modules: "):
        adapted(model, modules, init="pissa", targets=["first", "second"])
    assert torch.equal(model.first.weight, Classifier().first.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_name_that_would_also_name_another_module_in_the_file_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(4)
        layers = {name: nn.Linear(4, 4) for name in ("first", "pre_head", "head")}
        layers["attention"] = nn.MultiheadAttention(4, 2)
        return nn.ModuleDict(layers)

    with pytest.raises(ModelError, match=r"head would also name pre_head\. Name both"):
        adapted(make(), ["head"], targets=["first"])
    model = adapted(make(), [], targets=["first"])
    model["attention"].in_proj_weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"attention would also name attention\.out_proj"):
        save_adapter(model, tmp_path)
    model = changed(adapted(make(), ["head", "pre_head"], targets=["first"]))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(make(), tmp_path)["pre_head"].weight, model["pre_head"].weight)


def test_a_quantized_module_is_refused(recipe_file: RecipeFile) -> None:
    made = Recipe.load(recipe_file(adapter={"targets": "attention", "train_modules": ["up_proj"]}))
    with pytest.raises(ModelError, match=r"mlp\.up_proj is in NF4, and quantized weights cannot be trained"):
        train(made, terminal=False)


@pytest.mark.parametrize("modules", [["lm_head"], ["lm_head", "embed_tokens", "norm", "input_layernorm"]])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_steps_are_those_of_unfrozen_weights(tied: bool, modules: list[str]) -> None:
    if tied:
        modules = [*{*modules, "embed_tokens"}]
    base, model = tiny(tied), use_fused_layers(adapted(tiny(tied), modules))
    assert any(isinstance(m, FusedLayer) for m in model.modules()) == ("input_layernorm" not in modules)
    for network in (base, model):
        loss_sum(network, as_batch(IDS)).backward()
    found = {name: p.grad for name, p in trainable_parameters(model).items() if "lora" not in name}
    embeddings = 1 if tied else len({"lm_head", "embed_tokens"}.intersection(modules))
    assert len(found) == embeddings + (3 if "norm" in modules else 0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, base.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_modules_are_saved_loaded_and_switched(tmp_path: Path, tied: bool) -> None:
    model = changed(
        adapted(tiny(tied), ["norm", "post_attention_layernorm", "embed_tokens", "lm_head"])
    ).eval()
    save_adapter(model, tmp_path / "whole")
    wanted = model(input_ids=IDS).logits
    loaded = load_adapter(tiny(tied).eval(), tmp_path / "whole")
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    save_adapter(loaded.requires_grad_(False), tmp_path / "again")  # frozen, as for evaluation
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    adapters = Adapters(tiny(tied).eval())
    base = adapters.model(input_ids=IDS).logits
    adapters.load("whole", tmp_path / "whole")
    assert torch.equal(adapters.model(input_ids=IDS).logits, base)
    adapters.activate("whole")
    assert torch.equal(adapters.model(input_ids=IDS).logits, wanted)
    adapters.deactivate()
    assert torch.equal(adapters.model(input_ids=IDS).logits, base)


def test_an_unfrozen_head_of_a_plain_network_is_saved(tmp_path: Path) -> None:
    model = adapt(Classifier(), LoraSpec(targets=["first", "second"], rank=2, dtype=torch.float32))
    model.norm.requires_grad_(True)
    model.head.bias.requires_grad_(True)
    x = torch.randn(5, 6)
    model(x)  # changes the running statistics of the norm
    changed(model).eval()
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["head", "norm"]
    loaded = load_adapter(Classifier().eval(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert loaded.norm.num_batches_tracked == 1


def test_modules_stay_when_the_adapter_is_merged_in_memory(tmp_path: Path) -> None:
    model = changed(adapted(tiny(), ["norm"])).eval()
    wanted = model(input_ids=IDS).logits
    merged = merge_adapter(model)
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not trainable_parameters(merged)
    assert list(trained_parts(adapt(merged))) == [], "the next adapter starts from the merged model"


def test_full_training_has_no_parts_beside_an_adapter() -> None:
    model = tiny()
    assert part_notes(model, None) == []
    assert whole_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    model = adapt(Classifier(), LoraSpec(targets=["first"], rank=2))
    model.first.base.bias.requires_grad_(True)
    with pytest.raises(ModelError, match=r"first\.base is trained, but the adapter keeps it frozen"):
        save_adapter(model, tmp_path)
    model.first.base.bias.requires_grad_(False)
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    with pytest.raises(ModelError, match="Classifier has trained parameters of its own"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_classifier_gets_its_head(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}

    def make() -> nn.Module:
        torch.manual_seed(3)
        made = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=32, **settings)
        return LlamaForSequenceClassification(made)

    model = changed(adapted(make(), ["score"])).eval()
    save_adapter(model, tmp_path)
    wanted = model(input_ids=IDS).logits
    assert torch.equal(load_adapter(make().eval(), tmp_path)(input_ids=IDS).logits, wanted)
    assert "score" not in lora_layers(model), "all-linear leaves out what is trained as a whole"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "names", [["model.norm"], ["norm"], ["lm_head", "model.norm"], ["embed_tokens", "lm_head"]]
)
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path: Path, tied: bool, names: list[str]) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    theirs = changed(peft.get_peft_model(tiny(tied), settings)).eval()
    theirs.save_pretrained(tmp_path)
    wanted = theirs(input_ids=IDS).logits
    found = load_adapter(tiny(tied).eval(), tmp_path)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "modules"), [(True, ["norm"]), (False, ["lm_head", "norm"]), (True, ["lm_head", "embed_tokens"])]
)
def test_peft_computes_the_same_from_our_adapter(tmp_path: Path, tied: bool, modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = changed(adapted(tiny(tied), modules)).eval()
    save_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(tied), tmp_path).eval()
    wanted = model(input_ids=IDS).logits
    torch.testing.assert_close(loaded(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(trained_parts(model)) == len(modules)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_is_merged(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"rank": 4, "targets": "attention", "train_modules": ["norm", "lm_head", "input_layernorm"]}
    file = recipe_file(training={"max_steps": 4, "save_every": 2}, optimizer={"lr": 1e-2}, adapter=adapter)
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    assert whole.loss_before is not None
    assert whole.loss_after is not None
    assert whole.loss_after < whole.loss_before - 0.2
    notes = whole.facts["notes"]
    assert any(
        "2 decoder layers with modules trained as a whole run transformers' own" in note for note in notes
    )
    live = load_trained(whole.run)
    assert held_out_loss(live)[0] == pytest.approx(whole.loss_after, rel=1e-5)
    update = loop.update

    def interrupted(session: Any, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == 3:
            raise InterruptedError
        return update(session, batches, step, lr)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(InterruptedError):
        train(Recipe.load(file), terminal=False)
    monkeypatch.undo()
    resumed = train(Recipe.load(file), resume=True, terminal=False)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.run / name).read_bytes() == (whole.run / name).read_bytes()
    done = qlora("merge", whole.run, "--to", tmp_path / "merged", "--onto", "dequantized", "--tokens", 0)
    assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    live = load_trained(whole.run).model
    wanted, base = live(input_ids=IDS).logits, load_base(Recipe.load(file).base).eval()(input_ids=IDS).logits
    assert (merged(input_ids=IDS).logits - wanted).norm() < 0.01 * (wanted - base).norm()
    shown = qlora("adapter", "inspect", whole.run)
    assert "modules trained as a whole beside the adapter: input_layernorm, lm_head, model.norm" in " ".join(
        shown.stdout.split()
    )


@pytest.mark.parametrize(
    ("modules", "dtype"),
    [
        pytest.param(["lm_head"], "bfloat16", marks=pytest.mark.slow),
        pytest.param(["lm_head"], "float32", marks=pytest.mark.slow),
        pytest.param(["norm"], "float32", marks=pytest.mark.slow),
        pytest.param(["input_layernorm", "norm"], "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_memory_is_forecast(tmp_path: Path, modules: list[str], dtype: str) -> None:
    made = recipe(
        tmp_path, "llama", layers=7, adapter={"train_modules": modules}, base={"compute_dtype": dtype}
    )
    expected = foreseen(made, assumed(made))
    assert_right(expected, measured(made, assumed(made)))
    plain = recipe(tmp_path, "llama", layers=7, base={"compute_dtype": dtype})
    assert expected.parameters == foreseen(plain, assumed(plain)).parameters
