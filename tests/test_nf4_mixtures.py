"""Mixtures whose checkpoint is in NF4: experts in NF4 load as they are, experts in 16 bits are quantized."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixtures_for_tests import WEIGHTS, Experts, base, logits, plain, write_mixture, write_nf4_mixture
from runs_for_tests import fingerprint, finished_run, killed_and_resumed
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapter import load_adapter
from qlora.errors import ModelError
from qlora.memory.architecture import architecture
from qlora.merging.merge import merge
from qlora.model import nf4_cache
from qlora.model.checkpoint_notes import checkpoint_notes
from qlora.model.load import load_base, load_config
from qlora.model.precision import precision_of
from qlora.quantization import nf4
from qlora.quantization.expert_stack import expert_stacks, stacked
from qlora.quantization.stored_parameters import StoredParameters
from qlora.recipe import Base, Recipe
from qlora.storage.safetensors_files import ShardReader
from qlora.training.train import train


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("double_quant", [True, False])
def test_experts_in_nf4_load_as_they_are(mixture: Path, tmp_path: Path, double_quant: bool) -> None:
    folder, twin = write_nf4_mixture(mixture, tmp_path, "in NF4", double_quant=double_quant)
    own = Base(model=str(folder))
    assert not checkpoint_notes(own, load_config(own)), "all tensors are used, and none is quantized"
    model, reference = base(folder), plain(twin)
    assert precision_of(model).share == 1
    files = StoredParameters(reference, [*expert_stacks(model)], ShardReader(folder))
    for name, stack in expert_stacks(model).items():
        assert files.norm(name) == pytest.approx(reference.get_parameter(name).norm().item())
        for number, matrix in enumerate(reference.get_parameter(name)):
            assert torch.equal(stack.matrix(number, torch.float32), matrix)
    for name, parameter in reference.named_parameters():
        if name.endswith("mlp.gate.weight"):
            assert torch.equal(model.get_parameter(name), parameter), "a router in NF4 is dequantized"
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-4)
    forecast = base(folder, init="synthetic", double_quant=double_quant)
    shapes = [
        {name: [tensor.shape for tensor in stack.statistics()] for name, stack in expert_stacks(own).items()}
        for own in (model, forecast)
    ]
    assert shapes[0] == shapes[1]


def test_a_router_in_nf4_that_the_code_of_its_block_initialises_is_dequantized(tmp_path: Path) -> None:
    folder, twin = write_nf4_mixture(write_mixture(tmp_path / "16", "qwen3_next"), tmp_path, "in NF4")
    torch.testing.assert_close(logits(base(folder)), logits(plain(twin)), rtol=1e-5, atol=1e-4)


def test_parts_of_an_expert_have_statistics_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 2, 10, 52, generator=generator)  # no whole number of blocks
    weights = [nf4.quantize(matrix) for expert in matrices for matrix in expert]
    values = torch.stack([nf4.dequantize(one, one.quant_state, torch.float32) for one in weights])
    packed = stacked(weights, parts=2)
    assert torch.equal(packed.dense(torch.float32), values.view(3, 20, 52))
    assert torch.equal(packed.matrices(slice(1, 3), torch.float32), values.view(3, 20, 52)[1:])


def test_experts_that_were_quantized_in_different_ways_are_refused(mixture: Path, tmp_path: Path) -> None:
    folder, _ = write_nf4_mixture(mixture, tmp_path, "in NF4")
    tensors, numbers = load_file(folder / WEIGHTS), load_file(mixture / WEIGHTS)
    other = next(name for name in numbers if ".experts.3." in name)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(other)}
    packed = nf4.to_tensors(nf4.quantize(numbers[other], 128))
    tensors |= {other + suffix: tensor for suffix, tensor in packed.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match="its matrices were quantized in different ways"):
        base(folder)


@pytest.mark.parametrize("experts", ["in 16 bits", "in one tensor"])
def test_experts_in_16_bits_are_quantized_as_they_are_read(
    mixture: Path, tmp_path: Path, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_cache, "WORTH_BYTES", 0)
    folder, _ = write_nf4_mixture(mixture, tmp_path, experts, block_size=128, double_quant=False)
    expected = base(mixture, block_size=128, double_quant=False)
    found = base(folder)
    assert fingerprint(found) == fingerprint(expected), "the settings are those of the checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr("qlora.model.load._loaded", None)
        assert fingerprint(base(folder)) == fingerprint(expected), "the second start reads the cache"
    (note,) = checkpoint_notes(Base(model=str(folder)), load_config(Base(model=str(folder))))
    assert note.startswith(
        "base.model: the experts in this NF4 checkpoint are in 16 bits; a run quantizes them"
    )
    assert "in blocks of 128." in note


def test_experts_that_the_checkpoint_excludes_stay_in_16_bits(mixture: Path, tmp_path: Path) -> None:
    folder, _ = write_nf4_mixture(mixture, tmp_path, "in 16 bits")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "layers.0.mlp.experts"]
    (folder / "config.json").write_text(json.dumps(fields))
    own = Base(model=str(folder), compute_dtype="float32", allow_unquantized=True)
    model = load_base(own)
    assert [stack.packed for stack in expert_stacks(model).values()] == [False, False, True, True]
    recipe = Recipe.from_dict({"base": own.model_dump(), "data": {"source": "someone/rows"}})
    assert architecture(recipe, cuda=False).precision == precision_of(model)


def test_a_single_expert_in_16_bits_is_quantized_beside_the_others(mixture: Path, tmp_path: Path) -> None:
    folder, twin = write_nf4_mixture(mixture, tmp_path, "in NF4")
    tensors, numbers = load_file(folder / WEIGHTS), load_file(mixture / WEIGHTS)
    excluded = next(name for name in numbers if ".experts.3." in name)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(excluded)}
    save_file({**tensors, excluded: numbers[excluded]}, folder / WEIGHTS, {"format": "pt"})
    torch.testing.assert_close(logits(base(folder)), logits(plain(twin)), rtol=1e-5, atol=1e-4)
    (note,) = checkpoint_notes(Base(model=str(folder)), load_config(Base(model=str(folder))))
    assert note.startswith("base.model: 1 matrices of experts in this NF4 checkpoint are in 16 bits")


@pytest.fixture(scope="module")
def nf4_mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Experts], Path]:
    """Return a function that writes an NF4 checkpoint of a small Qwen 3 mixture."""
    source = write_mixture(tmp_path_factory.mktemp("source"), "qwen3_moe")
    return lambda experts: write_nf4_mixture(source, tmp_path_factory.mktemp("as"), experts)[0]


@pytest.mark.parametrize("experts", ["in NF4", pytest.param("in 16 bits", marks=pytest.mark.slow)])
def test_a_run_is_forecast_and_resumed_exactly(
    nf4_mixtures: Callable[[Experts], Path],
    experts: Experts,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = recipe_file(
        base={"model": str(nf4_mixtures(experts))},
        adapter={"rank": 8, "dropout": 0.1},
        training={"save_every": 1, "max_steps": 2},
    )
    recipe = Recipe.load(file)
    run = train(recipe, terminal=False).run
    memory = json.loads((run / "memory.json").read_text())
    assert memory["forecast"]["total_bytes"] == pytest.approx(memory["measured"]["total_bytes"], rel=0.01)
    print(memory["forecast"]["total_bytes"], memory["measured"]["total_bytes"])
    facts = json.loads((run / "facts.json").read_text())
    assert facts["base"]["kept"].startswith("all ")
    said = [note for note in facts["notes"] if "experts in this NF4 checkpoint are in 16 bits" in note]
    assert len(said) == (experts == "in 16 bits")
    monkeypatch.setattr("qlora.memory.run_memory.forecast", None)  # it takes as long as the steps
    other = recipe.model_copy(update={"output": str(tmp_path / "killed")})
    resumed = killed_and_resumed(other, 1, monkeypatch)
    names = "adapter/adapter_model.safetensors"
    assert (run / names).read_bytes() == (resumed / names).read_bytes()


@pytest.mark.parametrize("experts", ["in NF4", pytest.param("in 16 bits", marks=pytest.mark.slow)])
def test_merges_are_read_again(
    nf4_mixtures: Callable[[Experts], Path],
    experts: Experts,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    overruled = {"block_size": 128, "double_quant": False}
    recipe = Recipe.load(recipe_file(base={"model": str(nf4_mixtures(experts)), **overruled}))
    run = finished_run(recipe, size=0.3)
    before, live = base(recipe.base.model), load_adapter(base(recipe.base.model), run / "adapter")
    effect = (logits(live) - logits(before)).abs().amax(-1).median()
    merge(run, tmp_path / "dequantized", onto="dequantized", max_tokens=0)
    error = (logits(plain(tmp_path / "dequantized")) - logits(live)).abs().amax(-1).median()
    assert error < 0.02 * effect
    merge(run, tmp_path / "nf4", onto="nf4", max_tokens=60)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", experts_implementation="eager")
    again = base(tmp_path / "nf4", **overruled)
    assert precision_of(again).share == 1
    assert {stack.storage.block_size for stack in expert_stacks(again).values()} == {64}
    for found in (theirs, again):
        error = (logits(found) - logits(live)).abs().amax(-1).median()
        assert error < 0.5 * effect


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_projs.0.weight"]
)
def test_experts_in_another_form_of_nf4_are_refused(
    nf4_mixtures: Callable[[Experts], Path], name: str
) -> None:
    folder = nf4_mixtures("in 16 bits")
    packed = nf4.to_tensors(nf4.quantize(torch.randn(4, 64)))
    own = {name + suffix: tensor for suffix, tensor in packed.items()}
    save_file(load_file(folder / WEIGHTS) | own, folder / WEIGHTS, {"format": "pt"})
    recipe = Recipe.from_dict({"base": {"model": str(folder)}, "data": {"source": "someone/rows"}})
    for read in (lambda: architecture(recipe, cuda=False), lambda: load_base(recipe.base)):
        with pytest.raises(ModelError, match="experts in a form of 4 bits that qlora does not read"):
            read()


def test_experts_in_nf4_of_a_model_without_transformers_interface_are_refused(tmp_path: Path) -> None:
    folder, _ = write_nf4_mixture(write_mixture(tmp_path / "16", "longcat_flash"), tmp_path, "in NF4")
    with pytest.raises(ModelError, match="qlora does not read these for LongcatFlashForCausalLM"):
        load_base(Base(model=str(folder)))


@pytest.mark.usefixtures("without_forecast")
def test_a_run_that_an_earlier_version_began_with_experts_in_16_bits_is_not_resumed(
    nf4_mixtures: Callable[[Experts], Path],
    recipe_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.load(
        recipe_file(
            base={"model": str(nf4_mixtures("in 16 bits"))},
            adapter={"targets": "attention"},
            training={"save_every": 1, "max_steps": 2},
        )
    )
    linears = "nf4 in blocks of 64, double quantization"
    with monkeypatch.context() as earlier:
        earlier.setattr("qlora.adapter.identity.quantization_of", lambda model: linears)

        def resume(recipe: Recipe) -> Path:
            earlier.undo()
            with pytest.raises(
                ModelError, match=f"quantization: {linears} and {linears}; experts in"
            ) as error:
                train(recipe, resume=True, terminal=False)
            assert "An earlier qlora began it, which recorded no experts in 4 bits" in str(error.value)
            return Path(recipe.output)

        killed_and_resumed(recipe, 1, earlier, resume)


def damage(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a checkpoint in its file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def dropped(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        lost = [name for name in tensors if re.search(part, name)]
        assert lost
        for name in lost:
            del tensors[name]

    return change


def cut(part: str, rows: int = 1) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        short = [name for name in tensors if re.search(part, name)]
        assert short
        tensors.update({name: tensors[name][:-rows].clone() for name in short})

    return change


ONE = r"layers\.0\..*experts\.1\."
DOWN = r"layers\.0\..*experts\.1\.(down_proj|w2)\.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped(ONE), r"the files have \[3, "),
        (dropped(DOWN), r"down_proj: the files have \[3, "),
        (cut(r"q_proj\.weight$", 2), r"q_proj\.weight: the files have \[62, 64\]"),
    ],
    ids=["an expert", "its down projection", "rows of a linear"],
)
def test_a_16_bit_mixture_without_a_part_is_refused(
    mixture: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    """Quantization hides shapes from transformers, and a router would send tokens to no expert."""
    folder = damage(Path(shutil.copytree(mixture, tmp_path / "base")), change)
    with pytest.raises(ModelError, match=said):
        base(folder)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("in NF4", dropped(ONE), r"gate_up_proj: the files have \[3, .* in 4 bits"),
        ("in NF4", dropped(DOWN + r"\.nested_absmax"), "nested_absmax is missing"),
        ("in NF4", dropped(DOWN + r"\."), r"in uint8, and the model needs"),
        ("in NF4", cut(r"down_proj\.weight\.absmax|w2\.weight\.absmax", 30), "absmax where"),
        ("in NF4", cut(r"q_proj\.weight\.absmax", 30), r"q_proj\.weight: .* absmax where"),
        ("in 16 bits", dropped(ONE), r"gate_up_proj: the files have \[3, "),
        ("in 16 bits", cut(DOWN), "down_proj: its matrices do not fit together"),
        ("in one tensor", cut(r"layers\.0\..*down_proj"), r"down_proj: the files have \[3, "),
    ],
)
def test_an_nf4_mixture_without_a_part_is_refused(
    mixture: Path, tmp_path: Path, kind: Experts, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    folder, _ = write_nf4_mixture(mixture, tmp_path, kind)
    with pytest.raises(ModelError, match=said):
        base(damage(folder, change))


def test_a_list_of_modules_in_16_bits_without_the_head_is_named(mixture: Path, tmp_path: Path) -> None:
    """Without a list transformers leaves out the head; a list replaces its choice."""
    folder, _ = write_nf4_mixture(mixture, tmp_path, "in 16 bits")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["llm_int8_skip_modules"] = ["experts"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ModelError, match=r"lm_head\.weight: the files have it in 16 bits, and llm_int8_skip_modules"
    ):
        base(folder, allow_unquantized=True)
