"""PiSSA and LoftQ: A and B from the base's weights, the base that fits them, and everything that must know about it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import recipe
from commands_for_tests import qlora
from runs_for_tests import killed_and_resumed, update
from test_memory_forecast import assert_right, foreseen, measured
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora.adapter import Adapters, LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.algebra import tensors
from qlora.adapter.algebra.low_rank import principal
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import INITIAL_FILE, InitialValues
from qlora.adapter.merge import merge_adapter
from qlora.adapter.methods import METHODS
from qlora.errors import ModelError, RecipeError, UsageError
from qlora.inference.load import held_out_loss, load_trained
from qlora.memory.workload import assumed
from qlora.merging.write import MergeSource
from qlora.model.load import load_base
from qlora.quantization import nf4
from qlora.recipe import Adapter, Base, Recipe
from qlora.recipe.methods import METHODS as FACTS
from qlora.runtime.distributed import DataParallel
from qlora.training.prepare import _check_same_start
from qlora.training.train import train

# PEFT 0.21 reads a transformers 4 attribute, which transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RecipeFile = Callable[..., Path]
IDS = torch.arange(24).view(2, 12) * 7
SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": "all-linear"}


def started(folder: Path | str, init: str, *, dtype: str = "float32", **base: Any) -> nn.Module:
    """Load the base and adapt it, as `build` does."""
    section = Base(model=str(folder), compute_dtype=dtype, **base)
    settings, method = Adapter(init=init, **SETTINGS), METHODS["lora"]
    values = method.initial_values(settings, 0)
    return method.apply(load_base(section, initial=values), settings, 0).eval()


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name.removesuffix(".weight"): tensor for name, tensor in model.state_dict().items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_start_is_the_best_of_its_rank(tiny_llama: Path, init: str, dtype: torch.dtype) -> None:
    model = started(tiny_llama, init, dtype=str(dtype).removeprefix("torch."))
    values = InitialValues.of(model)
    assert values is not None
    assert values.distances is not None
    errors, plain, norm = 0.0, 0.0, 0.0
    for name, layer in lora_layers(model).items():
        weight = weights(tiny_llama, dtype)[name]
        packed = nf4.rounded(weight).double()
        target = weight.double() if init == "pissa" else weight.double() - packed
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        start = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        torch.testing.assert_close(start, best, rtol=0, atol=0.01 * s[0].item())  # A and B are bf16
        state = layer.frozen[1]
        assert state is not None
        base = nf4.dequantize(layer.frozen[0], state, torch.float32).double()
        kept = (weight.float() - start.float()).to(dtype) if init == "pissa" else weight
        torch.testing.assert_close(base, nf4.rounded(kept).double(), rtol=0, atol=1e-6)
        errors += (weight.double() - base - start).square().sum().item()
        plain += (weight.double() - packed).square().sum().item()
        norm += weight.double().square().sum().item()
    found = values.distances.as_json()
    assert found["start"] == pytest.approx((errors / norm) ** 0.5, rel=1e-3)
    assert found["without"] == pytest.approx((plain / norm) ** 0.5, rel=1e-3)
    assert found["start"] < found["without"]
    assert METHODS["lora"].notes(model) == [values.note]
    assert f"{found['start']:.2%}" in values.note


def test_a_plain_base_and_a_module_in_memory_start_as_before(tiny_llama: Path) -> None:
    expected = logits(LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval())
    torch.testing.assert_close(
        logits(started(tiny_llama, "pissa", quantization="none")), expected, rtol=1e-4, atol=1e-4
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    x = torch.randn(3, 12)
    y, before = network(x), network[0].weight.clone()
    adapt(network, LoraSpec(rank=7, targets="all-linear", init="pissa", scaling="alpha", alpha=2.0))
    torch.testing.assert_close(network(x), y, rtol=1e-4, atol=1e-4)
    assert not torch.equal(network[0].base.weight, before)
    assert BaseIdentity.of(network).changed is not None
    assert not network[2].lora_b[:, 5:].any(), "a weight of 5 rows has no sixth singular value"


def test_a_large_weight_is_decomposed_from_a_sketch_with_a_seed() -> None:
    random = torch.Generator().manual_seed(0)
    low = torch.randn(700, 6, generator=random) @ torch.randn(6, 600, generator=random)
    weight = low + 0.01 * torch.randn(700, 600, generator=random)
    ours = principal(weight, 4, torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(ours.b @ ours.a, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-3)
    again = principal(weight, 4, torch.Generator().manual_seed(1))
    assert torch.equal(ours.a, again.a)


def test_peft_s_pissa_starts_from_the_same_product(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"
    )
    theirs = dict(peft.get_peft_model(model, config).named_modules())
    ours = lora_layers(started(tiny_llama, "pissa", quantization="none"))
    for name in (f"model.layers.1.{end}" for end in ("self_attn.q_proj", "mlp.up_proj")):
        layer = theirs[f"base_model.model.{name}"]
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(
            ours[name].lora_b.float() @ ours[name].lora_a.float(), product, rtol=0, atol=2e-3
        )
        torch.testing.assert_close(ours[name].base.weight, layer.base_layer.weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_adapter_knows_that_its_base_was_changed(
    tiny_llama: Path, tmp_path: Path, quantization: str
) -> None:
    model = update(started(tiny_llama, "pissa", quantization=quantization))
    save_adapter(model, tmp_path / "a")
    section = Base(model=str(tiny_llama), compute_dtype="float32", quantization=quantization)
    changed = load_base(section, initial=InitialValues.stored(tmp_path / "a"))
    assert torch.equal(logits(load_adapter(changed.eval(), tmp_path / "a")), logits(model))
    plain = load_base(section).eval()
    if quantization == "nf4":
        with pytest.raises(ModelError, match="must be taken out before the base is quantized"):
            load_adapter(plain, tmp_path / "a")
        with pytest.raises(ModelError, match="must be taken out before the base is quantized"):
            load_adapter(plain, tmp_path / "a", any_base=True)
    else:
        torch.testing.assert_close(logits(load_adapter(plain, tmp_path / "a")), logits(model))
    save_adapter(adapt(load_base(section)), tmp_path / "b")
    with pytest.raises(
        ModelError, match=r"the weights before training: unchanged and changed by pissa \w{32}"
    ):
        load_adapter(load_base(section, initial=InitialValues.stored(tmp_path / "a")), tmp_path / "b")
    (tmp_path / "a" / INITIAL_FILE).unlink()
    with pytest.raises(ModelError, match='init_lora_weights = "pissa" is not supported'):
        load_adapter(load_base(section), tmp_path / "a")


def test_without_an_adapter_the_changed_base_gives_the_answers_of_the_base(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = started(tiny_llama, "pissa")
    at_start = logits(model)
    save_adapter(update(model), tmp_path / "a")
    section = Base(model=str(tiny_llama), compute_dtype="float32")
    adapters = Adapters(load_base(section, initial=InitialValues.stored(tmp_path / "a")).eval())
    adapters.load("a", tmp_path / "a")
    assert torch.equal(logits(adapters.model), at_start)
    adapters.activate("a")
    assert torch.equal(logits(adapters.model), logits(model))
    adapters.unload("a")
    assert torch.equal(logits(adapters.model), at_start)
    with pytest.raises(ModelError, match="Convert the adapter: qlora adapter export"):
        Adapters(load_base(section)).load("a", tmp_path / "a")


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_merging_adds_no_more_than_was_learned_to_the_original(
    tiny_llama: Path, tmp_path: Path, init: str
) -> None:
    model = started(tiny_llama, init)
    begun = {name: layer.merged_weight() for name, layer in lora_layers(model).items()}
    save_adapter(update(model, 0.02), tmp_path)
    source = MergeSource(Base(model=str(tiny_llama), compute_dtype="float32"), tmp_path)
    ends = {name: layer.merged_weight() for name, layer in lora_layers(model).items()}
    for onto in source.choices:
        merged = {key: tensor for part in source.tensors(onto) for key, tensor in part.items()}
        for name, end in ends.items():
            if onto == "original":
                learned = end - begun[name]
                expected = weights(tiny_llama)[name] + learned
                error = (merged[f"{name}.weight"].float() - expected).norm() / learned.norm()
                assert error < 0.05, "rounding to bf16"
            elif onto == "dequantized":
                assert torch.equal(merged[f"{name}.weight"], end.bfloat16())


def test_an_export_fits_the_unchanged_base_here_and_in_peft(tiny_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = update(started(tiny_llama, "pissa", quantization="none"))
    save_adapter(model, tmp_path / "a")
    done = qlora("adapter", "export", tmp_path / "a", "--to", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "converted to the unchanged base, 0.00% away" in " ".join(done.stdout.split())
    base = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    again = load_adapter(
        load_base(Base(model=str(tiny_llama), quantization="none", compute_dtype="float32")), tmp_path / "b"
    )
    assert {layer.rank for layer in lora_layers(again).values()} == {8}
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-3, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "b").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    whole = tensors.read(tmp_path / "a")
    assert {layer.rank for layer in whole.layers.values()} == {8}
    assert "init_lora_weights" in json.loads((tmp_path / "b" / "adapter_config.json").read_text())


def test_a_loftq_adapter_is_an_ordinary_one_on_the_ordinary_base(tiny_llama: Path, tmp_path: Path) -> None:
    model = update(started(tiny_llama, "loftq"))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    plain = load_base(Base(model=str(tiny_llama), compute_dtype="float32")).eval()
    assert torch.equal(logits(load_adapter(plain, tmp_path)), logits(model))
    assert "includes the correction of NF4 that loftq started from" in str(tensors.read(tmp_path).note)
    save_adapter(adapt(load_base(Base(model=str(tiny_llama), compute_dtype="float32"))), tmp_path)
    assert not (tmp_path / INITIAL_FILE).exists(), "it belongs to the earlier adapter"


def forbidden(*_: object, **__: object) -> None:
    raise RuntimeError("not asked for")


@pytest.mark.parametrize("init", ["pissa", pytest.param("loftq", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_adapter_and_needs_no_second_decomposition(
    recipe_file: RecipeFile, tmp_path: Path, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the forecast takes longer than the steps and has a test of its own
    monkeypatch.setattr("qlora.memory.run_memory.forecast", forbidden)
    file = recipe_file(adapter={"init": init}, training={"save_every": 2}, optimizer={"lr": 3e-3})
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    result = json.loads((whole.run / "result.json").read_text())
    distance = result["adapter"]["distance_from_16_bit"]
    assert 0 < distance["start"] < distance["without"]
    assert any(note.startswith(f"{init}: base and adapter start") for note in result["facts"]["notes"])
    assert whole.loss_after == pytest.approx(held_out_loss(load_trained(whole.run))[0], rel=1e-6)

    def resumed(recipe: Recipe) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("qlora.adapter.initial.principal", forbidden)
            return train(recipe, resume=True, terminal=False).run

    run = killed_and_resumed(Recipe.load(file), 3, monkeypatch, resumed)
    for name in ("adapter_model.safetensors", INITIAL_FILE, "qlora.json"):
        assert (run / "adapter" / name).read_bytes() == (whole.run / "adapter" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_its_memory_is_forecast(tmp_path: Path, init: str) -> None:
    made = recipe(tmp_path, "llama", layers=7, adapter={"init": init})
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


def test_bases_without_16_bit_weights_are_refused_or_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(Base(model=str(tiny_llama)))
    with pytest.raises(ModelError, match=r"in NF4 already\. Train with a recipe"):
        adapt(model, LoraSpec(init="pissa"))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"an NF4 checkpoint, and adapter\.init: loftq reads the 16-bit weights"
    ):
        started(tmp_path, "loftq")
    with pytest.raises(ModelError, match="no target is in NF4"):
        adapt(nn.Sequential(nn.Linear(4, 4)), LoraSpec(init="loftq", targets="all-linear"))
    with pytest.raises(UsageError, match="init pissa needs the weights of a model"):
        METHODS["lora"].layers[0](nn.Linear(4, 4), LoraSpec(init="pissa"))
    convolution = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(UsageError, match="init pissa is defined for LoRA's linear layers"):
        adapt(convolution, LoraSpec(rank=1, init="pissa", targets=["0"]))
    with pytest.raises(UsageError, match="an embedding, where B is drawn"):
        adapt(nn.Sequential(nn.Embedding(4, 4)), LoraSpec(rank=1, init="orthogonal", targets=["0"]))
    network = adapt(nn.Sequential(nn.Linear(4, 4)), LoraSpec(rank=1, init="pissa"))
    with pytest.raises(ModelError, match="this base was changed by pissa"):
        save_adapter(network, tmp_path / "d", diffusers="unet")
    with pytest.raises(RecipeError, match=r"adapter\.init: loftq corrects the error of NF4"):
        Recipe.load("quickstart", ["adapter.init=loftq", "base.quantization=none"])


def test_processes_with_different_starts_and_other_methods_are_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Others(DataParallel):
        def from_main(self, find: Callable[[], Any]) -> Any:
            return "another digest"

    with pytest.raises(ModelError, match="decompose the same weights with different last bits"):
        _check_same_start(Others(torch.device("cpu")), started(tiny_llama, "loftq"))
    monkeypatch.setitem(FACTS, "lora", replace(FACTS["lora"], starts_from_weights=False))
    with pytest.raises(RecipeError, match=r"adapter\.init: pissa is not defined for adapter\.method: lora"):
        Recipe.load("quickstart", ["adapter.init=pissa"])


def test_a_synthetic_base_has_nothing_to_take(tiny_llama: Path) -> None:
    section = Base(model=str(tiny_llama), init="synthetic")
    settings, method = Adapter(init="pissa", **SETTINGS), METHODS["lora"]
    model = method.apply(load_base(section, initial=method.initial_values(settings, 0)), settings, 0)
    assert not any(layer.lora_b.any() for layer in lora_layers(model).values())
    assert "has no effect on a synthetic base" in method.notes(model)[0]
    assert method.course(model, settings, 1).outcome() == {}, "nothing was measured"


def test_another_adapter_does_not_take_over_the_start_of_an_earlier_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    section = Base(model=str(tiny_llama), compute_dtype="float32")
    save_adapter(started(tiny_llama, "loftq"), tmp_path / "loftq")
    adapters = Adapters(load_base(section))
    adapters.load("a", tmp_path / "loftq")
    adapters.unload("a")
    save_adapter(adapt(adapters.model), tmp_path / "b")
    assert not (tmp_path / "b" / INITIAL_FILE).exists()
    save_adapter(started(tiny_llama, "pissa"), tmp_path / "pissa")
    changed = load_base(section, initial=InitialValues.stored(tmp_path / "pissa"))
    with pytest.raises(ModelError, match="changed for an adapter of pissa: load the base again"):
        adapt(changed)
    merged = merge_adapter(started(tiny_llama, "pissa"))
    save_adapter(adapt(merged), tmp_path / "c")
    assert not (tmp_path / "c" / INITIAL_FILE).exists()
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_each_of_several_adapters_keeps_its_own_start(tiny_llama: Path, tmp_path: Path) -> None:
    section = Base(model=str(tiny_llama), compute_dtype="float32")
    save_adapter(started(tiny_llama, "loftq"), tmp_path / "loftq")
    save_adapter(adapt(load_base(section)), tmp_path / "plain")
    for names in (("plain", "loftq"), ("loftq", "plain")):
        adapters = Adapters(load_base(section))
        for name in names:
            adapters.load(name, tmp_path / name)
        assert InitialValues.of(adapters.model) is None
        for name in names:
            adapters.activate(name)
            save_adapter(adapters.model, tmp_path / "again")
            assert (tmp_path / "again" / INITIAL_FILE).exists() == (name == "loftq")
    plain = load_adapter(load_base(section), tmp_path / "plain", any_base=True)
    load_adapter(plain, tmp_path / "plain")
    assert InitialValues.of(plain) is None


def test_the_start_follows_an_adapter_that_is_loaded_in_the_place_of_another(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = started(tiny_llama, "loftq")
    values = InitialValues.of(model)
    save_adapter(model, tmp_path / "loftq")
    load_adapter(model, tmp_path / "loftq")
    assert InitialValues.of(model) is values, "with its distances"
    save_adapter(started(tiny_llama, "kaiming"), tmp_path / "plain")
    load_adapter(model, tmp_path / "plain")
    assert InitialValues.of(model) is None


def test_an_adapter_on_the_changed_base_of_another_is_not_saved(tiny_llama: Path, tmp_path: Path) -> None:
    section = Base(model=str(tiny_llama), compute_dtype="float32")
    save_adapter(started(tiny_llama, "pissa"), tmp_path / "pissa")
    save_adapter(adapt(load_base(section)), tmp_path / "plain")
    adapters = Adapters(load_base(section, initial=InitialValues.stored(tmp_path / "pissa")))
    adapters.load("pissa", tmp_path / "pissa")
    adapters.load("plain", tmp_path / "plain", any_base=True)
    adapters.activate("pissa")
    save_adapter(adapters.model, tmp_path / "again")
    load_adapter(load_base(section, initial=InitialValues.stored(tmp_path / "again")), tmp_path / "again")
    adapters.activate("plain")
    with pytest.raises(ModelError, match="another adapter changed the base"):
        save_adapter(adapters.model, tmp_path / "refused")


def test_loftq_refuses_a_target_without_an_error_to_correct(tiny_llama: Path) -> None:
    settings, method = Adapter(init="loftq", rank=4, targets=["q_proj", "lm_head"]), METHODS["lora"]
    section = Base(model=str(tiny_llama), compute_dtype="float32")
    with pytest.raises(ModelError, match=r"loftq finds no error of NF4 .* in lm_head"):
        load_base(section, initial=method.initial_values(settings, 0))


def test_a_shared_head_cannot_be_a_target_of_pissa() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(ModelError, match="init pissa changes the weight of a, which b shares"):
        adapt(tied, LoraSpec(rank=2, targets=["a"], init="pissa"))
