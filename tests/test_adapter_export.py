"""Exported adapters mean the same to PEFT, to vLLM's rule and to llama.cpp's rule, which read one alpha."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from adapters_for_tests import CONFIG, TENSORS, updates, write_adapter
from commands_for_tests import qlora
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.adapter import save_adapter
from qlora.adapter.algebra.plain import note, plain
from qlora.adapter.algebra.tensors import read
from qlora.adapter.config import read_fields
from qlora.adapter.methods import ADAPTERS, METHODS
from qlora.adapter.trained_parts import train_modules
from qlora.errors import ModelError
from qlora.memory.no_forecast import NoForecastError
from qlora.recipe import Adapter, Recipe
from qlora.training.train import train

LAYERS = {
    "blocks.0.q": (9, 7, 2),
    "blocks.0.up": (9, 7, 4),
    "blocks.1.q": (9, 7, 2),
    "blocks.1.up": (9, 7, 4),
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"q": 64}},
    "ranks": {},
    "all": {"use_rslora": True, "alpha_pattern": {"up": 3}},
}


def served(folder: Path, *, own_rank: bool) -> dict[str, Tensor]:
    """Return the updates [out, in] as llama.cpp (`own_rank`) or vLLM computes them, in float64."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = config["lora_alpha"] / (a.shape[0] if own_rank else config["r"]) * b @ a
    return found


@pytest.mark.parametrize("config", PARTICULAR.values(), ids=PARTICULAR)
def test_every_rule_gives_the_update_of_the_adapter(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "a", LAYERS, dtype=torch.bfloat16, **config)
    exact = updates(folder)
    assert any(
        not torch.allclose(served(folder, own_rank=own)[name], exact[name])
        for own in (True, False)
        for name in LAYERS
    )
    done = qlora("adapter", "export", folder, "--to", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "note" not in done.stdout
    for found in (updates(tmp_path / "b"), *(served(tmp_path / "b", own_rank=own) for own in (True, False))):
        for name in LAYERS:
            torch.testing.assert_close(found[name], exact[name], rtol=1e-6, atol=1e-6)
    written = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert written["r"] == 4
    assert float(written["lora_alpha"]).is_integer()
    assert (written["use_rslora"], written["alpha_pattern"], written["rank_pattern"]) == (False, {}, {})


def test_a_plain_adapter_is_exported_bit_for_bit(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", {"x.q": (9, 7, 3), "x.k": (5, 7, 3)}, dtype=torch.bfloat16, alpha=7
    )
    whole = read(folder)
    exported, errors = plain(whole, dtype=torch.bfloat16)
    for name, layer in exported.layers.items():
        assert torch.equal(layer.a, whole.layers[name].a)
        assert torch.equal(layer.b, whole.layers[name].b)
        assert errors[name].error == 0


def test_an_update_that_a_dtype_cannot_hold_is_an_error(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", LAYERS, alpha_pattern={"blocks.0.q": 1e9})
    with pytest.raises(ModelError, match=r"too large for float16; use a wider --dtype"):
        plain(read(folder), dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_computes_the_same_logits_with_the_export(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    names = [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    shapes = {name: (48 if "up" in name else 32, 32, 2 if "q_proj" in name else 5) for name in names}
    write_adapter(
        tmp_path / "a", shapes, alpha_pattern={"v_proj": 40}, use_rslora=True, task_type="CAUSAL_LM"
    )
    assert qlora("adapter", "export", tmp_path / "a", "--to", tmp_path / "b").returncode == 0

    def logits(folder: Path | None, updates: dict[str, Tensor] | None = None) -> Tensor:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        for name, update in (updates or {}).items():
            model.get_submodule(name).weight.data += update
        if folder is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.PeftModel.from_pretrained(model, folder).double().eval()
        with torch.no_grad():
            return model(torch.arange(20)[None]).logits

    bare, ours, exported = (logits(folder) for folder in (None, tmp_path / "a", tmp_path / "b"))
    assert (ours - bare).abs().max() > 0.1
    torch.testing.assert_close(exported, ours, rtol=1e-5, atol=1e-5)
    for own_rank in (True, False):  # llama.cpp's rule and vLLM's
        applied = logits(None, served(tmp_path / "b", own_rank=own_rank))
        torch.testing.assert_close(applied, ours, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(None, served(tmp_path / "a", own_rank=own_rank)), ours, atol=1e-2)


def test_a_run_with_rslora_says_that_other_servers_read_it_differently(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(adapter={"scaling": "alpha/sqrt(rank)"}, training={"max_steps": 1})
    with patch("qlora.memory.run_memory.forecast", side_effect=NoForecastError("not asked for")):
        outcome = train(Recipe.load(file), terminal=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "the adapter has rsLoRA's scaling" in said
    assert f"qlora adapter export {outcome.run}" in said


def test_a_sum_with_ranks_of_single_layers_says_so_and_a_plain_one_does_not(tmp_path: Path) -> None:
    folders = write_adapter(tmp_path / "a", LAYERS), write_adapter(tmp_path / "b", {"x.q": (9, 7, 3)})
    for folder, said in zip(folders, (True, False), strict=True):
        done = qlora(
            "adapter", "compose", f"{folder}:1", f"{folder}:1", "--to", tmp_path / f"of-{folder.name}"
        )
        assert ("ranks of single layers" in " ".join(done.stdout.split())) == said


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("method", [method.name for method in ADAPTERS])
def test_the_note_of_each_method_names_a_command_that_takes_its_adapters(
    tmp_path: Path, method: str, beside: bool
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    METHODS[method].apply(model, Adapter(method=method, rank=2, targets=["a"]), seed=0)
    if beside:
        train_modules(model, ["norm"])
    save_adapter(model, tmp_path / "a")
    config = read_fields(tmp_path / "a" / CONFIG)
    said = note({**config, "rank_pattern": {"a": 2}} if method == "dora" else config, tmp_path / "a")
    if method == "lora" and not beside:
        assert said is None
        return
    assert said is not None
    exported = "qlora adapter export" in said
    assert exported != ("qlora merge" in said)
    if METHODS[method].why_no_sum is None:
        assert exported != beside
        return
    assert said.startswith(f"vLLM and llama.cpp do not read adapters of {method}. For them, ")
    with pytest.raises(ModelError, match="Merge them into their base instead, with qlora merge"):
        read(tmp_path / "a")
