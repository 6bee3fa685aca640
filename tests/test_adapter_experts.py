"""Adapters of experts without a model: sums, approximations, spectra and exports, against dense updates and PEFT."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import CONFIG, TENSORS
from architectures_for_tests import config
from commands_for_tests import qlora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.algebra.compose import compose, compress
from qlora.adapter.algebra.spectrum import spectra
from qlora.adapter.algebra.tensors import read, write
from qlora.errors import ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

MIXTURES = ["qwen3_moe", "gpt_oss", "mixtral"]
"""gate and up concatenated; interleaved, and matrices stored transposed; names of an older layout in the files"""
IDS = torch.arange(24).view(2, 12) * 7
Deltas = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the checkpoint of a small mixture."""
    made: dict[str, Path] = {}

    def write_base(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config(architecture, num_hidden_layers=2))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.2)
            model.save_pretrained(made[architecture])
        return made[architecture]

    return write_base


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


def trained(folder: Path, to: Path, *, seed: int = 0, **spec: Any) -> Path:
    """Write an adapter of random numbers, as training writes it."""
    model = adapt(plain_model(folder), LoraSpec(**spec))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in (layer.lora_a, layer.lora_b):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return save_adapter(model, to, base_model=str(folder))


def deltas(folder: Path) -> Deltas:
    """Return the updates by layer in float64, [E, out, in] for experts, from the tensors of PEFT's file."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    found: Deltas = {}
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")].double()
        inner = name.removesuffix(".base_layer")
        experts = inner.endswith(".experts")
        layer = f"{inner}.{'gate_up_proj' if inner != name else 'down_proj'}" if experts else name
        pattern = "^" + layer.replace(".", r"\.")
        rank = config["rank_pattern"].get(pattern, config["r"])
        alpha = config["alpha_pattern"].get(pattern, config["lora_alpha"])
        scaling = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
        count = len(a) // rank if experts else 1
        matrices = [scaling * b[:, e::count] @ a[e * rank : (e + 1) * rank].double() for e in range(count)]
        found[layer] = torch.stack(matrices) if experts else matrices[0]
    return found


def total(parts: list[tuple[Path, float]]) -> Deltas:
    found: Deltas = {}
    for folder, weight in parts:
        for name, delta in deltas(folder).items():
            found[name] = found.get(name, torch.zeros(())) + weight * delta
    return found


def merged(folder: Path, updates: Mapping[str, Tensor]) -> Any:
    """Return the base with the updates added to its weights."""
    model = plain_model(folder)
    with torch.no_grad():
        for name, delta in updates.items():
            if delta.ndim == 2:
                model.get_submodule(name).weight += delta.float()
            else:
                transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
                model.get_parameter(name).add_((delta.mT if transposed else delta).float())
    return model


def same(ours: Tensor, theirs: Tensor, before: Tensor, share: float = 1e-4) -> bool:
    """Return True if logits differ by less than a share of what the adapter changes."""
    effect = (theirs - before).abs().max()
    assert effect > 0.05
    return bool((ours - theirs).abs().max() < share * effect)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_sum_is_exact_for_each_expert_and_everyone_reads_it(
    base: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = base(architecture)
    parts = [
        (trained(folder, tmp_path / "c", seed=3, rank=2, dropout=0.1, targets="attention"), 0.5),
        (trained(folder, tmp_path / "a", seed=1, rank=4, alpha=6), 0.7),
        (trained(folder, tmp_path / "b", seed=2, rank=3, expert_rank=2, targets="experts"), -0.3),
    ]
    for weighted in (parts, parts[::-1]):
        composed, errors = compose([(read(path), weight) for path, weight in weighted])
        to = tmp_path / f"sum of {weighted[0][0].name}"
        write(composed, to)
        exact, found = total(parts), deltas(to)
        assert exact.keys() == found.keys() == errors.keys()
        for name, delta in exact.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-6, atol=1e-6 * delta.norm().item())
            assert errors[name].norm == pytest.approx(delta.norm().item())
        assert composed.layers["model.layers.0.mlp.experts.down_proj"].rank == 2 + 2
        before, reference = logits(plain_model(folder)), logits(merged(folder, exact))
        assert same(logits(load_adapter(plain_model(folder), to, any_base=True)), reference, before)
        assert same(logits(PeftModel.from_pretrained(plain_model(folder), to)), reference, before)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_approximation_is_the_best_of_its_rank_for_each_expert(
    base: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = base(architecture)
    path = trained(folder, tmp_path / "a", rank=6, expert_rank=4, alpha=6)
    small, errors = compress(read(path), rank=2)
    write(small, tmp_path / "small")
    exact, found = deltas(path), deltas(tmp_path / "small")
    for name, delta in exact.items():
        best = torch.linalg.svdvals(delta)[..., 2:].norm().item()
        assert (found[name] - delta).norm().item() == pytest.approx(best, rel=1e-2)
        assert errors[name].error == pytest.approx((found[name] - delta).norm().item(), rel=1e-3)
    before, reference = logits(plain_model(folder)), logits(merged(folder, found))
    theirs = PeftModel.from_pretrained(plain_model(folder), tmp_path / "small")
    assert same(logits(theirs), reference, before)
    assert same(logits(load_adapter(plain_model(folder), tmp_path / "small")), reference, before)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_the_experts_of_a_projection_share_the_least_rank_that_keeps_their_energy(
    base: Callable[[str], Path], tmp_path: Path, energy: float
) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=4, expert_rank=8, targets="experts")
    whole = read(path)
    small, _ = compress(whole, energy=energy, dtype=torch.float64)
    shown = spectra(whole)
    for name, delta in deltas(path).items():
        energies = torch.linalg.svdvals(delta).square().sum(0)
        kept = energies.cumsum(0) / energies.sum()
        rank = small.layers[name].rank
        assert rank == int((kept[:8] < energy - 1e-9).sum()) + 1
        assert shown[name].norm == pytest.approx(delta.norm().item())
        assert shown[name].rank_for(energy) == rank


@pytest.mark.parametrize("architecture", MIXTURES)
def test_inspect_has_a_line_for_each_projection(
    base: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = base(architecture)
    path = trained(folder, tmp_path / "a", rank=4)
    done = qlora("adapter", "inspect", path, "--layers")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if ".experts." in line]
    expected = {name: delta.norm().item() for name, delta in deltas(path).items() if delta.ndim == 3}
    assert len(expected) == len(lines) == 4
    assert {name: float(norm) for name, _, _, norm, *_ in lines} == pytest.approx(expected, rel=1e-2)
    weights = plain_model(folder).state_dict()
    shares = {name: norm / weights[name].norm().item() for name, norm in expected.items()}
    shown = {name: float(share.rstrip("%")) / 100 for name, _, _, _, share, *_ in lines}
    assert shown == pytest.approx(shares, rel=1e-2)


def per_expert(folder: Path) -> Deltas:
    """Return the updates of an adapter with one alpha and one rank, as vLLM computes them, by the names in the file."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert {len(a) for key, a in tensors.items() if ".lora_A." in key} == {config["r"]}
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): config["lora_alpha"]
        / config["r"]
        * tensors[key.replace("lora_A", "lora_B")].double()
        @ a.double()
        for key, a in tensors.items()
        if ".lora_A." in key
    }


NAMES = {
    "qwen3_moe": "model.layers.{}.mlp.experts.{}.gate_proj up_proj down_proj",
    "gpt_oss": "model.layers.{}.mlp.experts.{}.gate_proj up_proj down_proj",
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.w1 w3 w2",
}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_export_has_the_update_of_each_matrix_of_each_expert(
    base: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = base(architecture)
    path = trained(folder, tmp_path / "a", rank=6, expert_rank=4, alpha=6, scaling="alpha/sqrt(rank)")
    choice = ["--experts", "apart"] if architecture == "gpt_oss" else []
    done = qlora("adapter", "export", path, "--to", tmp_path / "served", *choice)
    assert done.returncode == 0, done.stderr
    assert "note" not in done.stdout
    exact, found = deltas(path), per_expert(tmp_path / "served")
    place, *leaves = NAMES[architecture].replace(" ", f" {NAMES[architecture].rpartition('.')[0]}.").split()
    for layer in range(2):
        wide = exact.pop(f"model.layers.{layer}.mlp.experts.gate_up_proj")
        down = exact.pop(f"model.layers.{layer}.mlp.experts.down_proj")
        interleaved = architecture == "gpt_oss"
        gate, up = (wide[:, ::2], wide[:, 1::2]) if interleaved else wide.chunk(2, 1)
        for expert in range(4):
            for name, delta in zip((place, *leaves), (gate, up, down), strict=True):
                key = name.format(layer, expert)
                torch.testing.assert_close(found.pop(key), delta[expert], rtol=1e-5, atol=1e-6)
    assert exact.keys() == found.keys(), "attention"
    for name, delta in exact.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)
    targets = json.loads((tmp_path / "served" / CONFIG).read_text())
    assert "target_parameters" not in targets
    with pytest.raises(ModelError, match="Combine the adapters from which they were exported"):
        compose([(read(path), 1.0), (read(tmp_path / "served"), 1.0)])
    assert qlora("adapter", "inspect", tmp_path / "served").returncode == 0
    if architecture != "gpt_oss":  # PEFT reads such files as adapters of transformers 4
        theirs = PeftModel.from_pretrained(plain_model(folder), tmp_path / "served")
        before, reference = logits(plain_model(folder)), logits(merged(folder, deltas(path)))
        assert same(logits(theirs), reference, before)
        with pytest.raises(ModelError, match="A and B for each matrix of each expert"):
            load_adapter(plain_model(folder), tmp_path / "served")


def test_experts_stay_stacked_where_the_files_of_the_base_have_them_so(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    choices = {"gpt_oss": (), "qwen3_5_moe_text": (), "qwen3_moe": ("--experts", "stacked")}
    for architecture, choice in choices.items():
        folder = base(architecture)
        path = trained(folder, tmp_path / architecture, rank=6, expert_rank=4)
        done = qlora("adapter", "export", path, "--to", tmp_path / "served" / architecture, *choice)
        assert done.returncode == 0, done.stderr
        assert ("the experts stay stacked" in done.stdout) == (not choice)
        written = json.loads((tmp_path / "served" / architecture / CONFIG).read_text())
        assert written["rank_pattern"] == {}
        assert len(written["target_parameters"]) == 2
        exact, found = deltas(path), deltas(tmp_path / "served" / architecture)
        assert all(torch.equal(found[name], delta) for name, delta in exact.items())


def test_an_export_needs_the_base_of_its_experts(base: Callable[[str], Path], tmp_path: Path) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=2)
    other = qlora("adapter", "export", path, "--to", tmp_path / "b", "--base", base("gpt_oss"))
    assert other.returncode == 4
    assert "are not in GptOssForCausalLM" in other.stderr
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    (path / "manifest.json").unlink(missing_ok=True)
    assert "give it with --base" in qlora("adapter", "export", path, "--to", tmp_path / "b").stderr
    done = qlora("adapter", "export", path, "--to", tmp_path / "b", "--base", base("qwen3_moe"))
    assert done.returncode == 0, done.stderr
    plain = trained(base("qwen3_moe"), tmp_path / "c", rank=2, targets="attention")
    refused = qlora("adapter", "export", plain, "--to", tmp_path / "d", "--experts", "apart")
    assert refused.returncode == 2
    assert "has no stacked experts" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", "RUN", "--to", "b", "--base", "bundled/base"], 4, "are not in LlamaForCausalLM"),
        (["export", "RUN", "--to", "b", "--base", ""], 2, "--base: it is empty"),
        (
            ["export", "RUN", "--to", "b", "--experts", "stacked", "--base", "bundled/base"],
            2,
            "--base: not read",
        ),
        (["inspect", "RUN", "--base", "bundled/base"], 4, "are not in LlamaForCausalLM"),
    ],
)
def test_another_base_of_experts_is_refused(
    base: Callable[[str], Path], tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=2)
    words = [{"RUN": str(path), "b": str(tmp_path / "b")}.get(word, word) for word in arguments]
    done = qlora("adapter", *words)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "b").exists()


def test_experts_that_the_config_does_not_list_are_named_with_its_field(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=2)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "target_parameters": []}))
    (path / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="Add them to target_parameters"):
        read(path)
    with pytest.raises(ModelError, match="Add them to target_parameters in"):
        load_adapter(plain_model(base("qwen3_moe")), path, any_base=True)


def test_a_base_that_is_gone_is_named_with_the_option(base: Callable[[str], Path], tmp_path: Path) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=2)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    (path / "manifest.json").unlink(missing_ok=True)
    assert "Give it with --base" in qlora("adapter", "export", path, "--to", tmp_path / "b").stderr


def test_an_export_that_qlora_does_not_load_has_no_commands_to_try(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=2)
    qlora("adapter", "export", path, "--to", tmp_path / "b")
    for arguments in (
        ["inspect", tmp_path / "b"],
        ["compress", tmp_path / "b", "--rank", 1, "--to", tmp_path / "c"],
    ):
        assert "Try it" not in qlora("adapter", *arguments).stdout


def test_a_run_of_a_mixture_and_its_sums_name_the_export(base: Callable[[str], Path], tmp_path: Path) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=4, expert_rank=4)
    done = qlora("adapter", "compose", f"{path}:0.5", "--to", tmp_path / "b")
    said = " ".join(done.stdout.split())
    assert f"For vLLM and SGLang: qlora adapter export {tmp_path / 'b'} --to DIR" in said


def test_ranks_that_do_not_fit_the_tensors_of_experts_are_refused(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=4, expert_rank=4, targets="experts")
    config = json.loads((path / CONFIG).read_text())
    pattern = r"^model\.layers\.0\.mlp\.experts\.down_proj"
    for rank, problem in (
        (3, "but the rank in"),
        (2, "different numbers of experts"),
        (99, "but the rank in"),
    ):
        broken = Path(shutil.copytree(path, tmp_path / str(rank)))
        (broken / CONFIG).write_text(json.dumps({**config, "rank_pattern": {pattern: rank}}))
        with pytest.raises(ModelError, match=problem):
            read(broken)
    tensors = load_file(path / TENSORS)
    name = next(name for name in tensors if "base_layer" in name)
    save_file({**tensors, name: tensors[name][:-1]}, path / TENSORS)
    with pytest.raises(ModelError, match="but the rank in"):
        read(path)


def test_different_numbers_of_experts_have_no_sum(base: Callable[[str], Path], tmp_path: Path) -> None:
    path = trained(base("qwen3_moe"), tmp_path / "a", rank=4, targets="experts")
    whole = read(path)
    fewer = {name: replace(x, a=x.a[:3], b=x.b[:3]) for name, x in whole.layers.items()}
    with pytest.raises(ModelError, match=r"is \[4, 128, 64\] and \[3, 128, 64\] in different adapters"):
        compose([(whole, 1.0), (replace(whole, layers=fewer), 1.0)])
