"""Base models: loading, quantization, synthetic weights and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora.errors import ModelError
from qlora.model.known_architectures import KNOWN_ARCHITECTURES
from qlora.model.load import compute_dtype, load_base, load_config, load_tokenizer
from qlora.quantization import nf4
from qlora.recipe import Base

CPU = torch.device("cpu")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def section(model: Path | str, **kwargs: object) -> Base:
    return Base(model=str(model), compute_dtype="float32", **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_pretrained_base_is_quantized_as_bitsandbytes_would(
    tiny_llama: Path, block_size: int, double_quant: bool
) -> None:
    model = load_base(section(tiny_llama, block_size=block_size, double_quant=double_quant))
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    quantized = [name for name, module in model.named_modules() if nf4.is_nf4(module)]
    assert len(quantized) == 2 * len(LINEARS)
    for name in quantized:
        linear = model.get_submodule(name)
        assert isinstance(linear, nf4.NF4Linear), name  # never bitsandbytes' own forward
        expected = nf4.quantize(original.get_submodule(name).weight.data, block_size, double_quant)
        state = nf4.quant_state(linear)
        assert state is not None
        assert state.blocksize == block_size
        assert torch.equal(linear.weight.data, expected.data), name
        assert torch.equal(
            nf4.dequantize(linear.weight, state, torch.float32),
            nf4.dequantize(expected, expected.quant_state, torch.float32),
        )
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)


TABLES = """
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING, AttentionInterface(), AttentionMaskInterface()
before = [dict(table) for table in tables]
import qlora.training.train
from qlora.model.varlen_attention import CAPPED, NAME
own = NAME, CAPPED
assert [{key: value for key, value in table.items() if key not in own} for table in tables] == before
"""


def test_the_package_leaves_the_tables_of_transformers_as_they_are() -> None:
    """Our attention is registered in two of the tables, under its own names."""
    subprocess.run([sys.executable, "-c", TABLES], check=True)


def test_other_models_are_quantized_by_transformers_own_quantizer(tiny_llama: Path) -> None:
    """Another model gets neither our block size nor our quantizer, also after a base was loaded in this process."""
    load_base(section(tiny_llama, block_size=128))
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings)
    assert type(model.hf_quantizer) is Bnb4BitHfQuantizer
    assert {m.weight.quant_state.blocksize for m in model.modules() if nf4.is_nf4(m)} == {64}


def test_a_prequantized_checkpoint_loads_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    saved = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=settings, dtype=torch.float32
    )
    saved.save_pretrained(tmp_path / "nf4")
    ids = torch.arange(12)[None]
    expected = load_base(section(tiny_llama)).eval()(input_ids=ids).logits
    assert torch.equal(load_base(section(tmp_path / "nf4")).eval()(input_ids=ids).logits, expected)


def test_a_checkpoint_quantized_otherwise_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "fp4")
    config = json.loads((tmp_path / "fp4" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
    }
    (tmp_path / "fp4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="already quantized by bitsandbytes \\(fp4\\)"):
        load_base(section(tmp_path / "fp4"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_synthetic_is_the_real_architecture_without_its_weights(
    tiny_llama: Path, tmp_path: Path, quantization: str
) -> None:
    (tmp_path / "shapes").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "shapes")
    real = load_base(section(tiny_llama, quantization=quantization))
    made = load_base(section(tmp_path / "shapes", init="synthetic", quantization=quantization))
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert not any(parameter.is_meta for parameter in made.parameters())
    logits = made(input_ids=torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0 < logits.std() < 10
    again = load_base(section(tmp_path / "shapes", init="synthetic", quantization=quantization))
    assert torch.equal(again(input_ids=torch.arange(12)[None]).logits, logits)
    assert len(load_tokenizer(section(tmp_path / "shapes", init="synthetic"))) == 2048


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_random_depends_on_its_seed(tiny_llama: Path, quantization: str) -> None:
    def weight(seed: int) -> torch.Tensor:
        model = load_base(section(tiny_llama, init="random", quantization=quantization), seed=seed)
        linear = model.get_submodule("model.layers.0.mlp.up_proj")
        assert nf4.is_nf4(linear) == (quantization == "nf4")
        return linear.weight.data

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_every_known_architecture_needs_no_network() -> None:
    for hub_id in KNOWN_ARCHITECTURES:
        config = load_config(section(hub_id, init="synthetic"))
        assert config.get_text_config().hidden_size >= 1024


def test_the_compute_dtype_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(model="bundled/base")
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("qlora.model.load.multiplies_bfloat16", lambda s=supported: s)
        assert compute_dtype(base, CPU) == expected
    assert compute_dtype(base, torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(Base(model="x", compute_dtype="float32"), torch.device("cuda")) == torch.float32


def test_norms_and_embeddings_stay_bf16_when_bf16_is_asked_for(tiny_llama: Path) -> None:
    model = load_base(Base(model=str(tiny_llama), compute_dtype="bfloat16"))
    others = {n: p.dtype for n, p in model.named_parameters() if p.dtype != torch.uint8}
    assert set(others.values()) == {torch.bfloat16}
    assert isinstance(model.get_submodule("model.norm"), nn.Module)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("./nowhere", "there is no folder"),
        ("empty", "has no config.json"),
        ("unknown", "does not know the architecture in config.json"),
        ("weightless", "model.safetensors is missing"),
        ("some/model", "hub cannot be reached"),
    ],
)
def test_a_base_that_cannot_be_loaded_gives_one_clear_line(
    tmp_path: Path, tiny_llama: Path, folder: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nonesuch"}')
    (tmp_path / "weightless").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "weightless")
    model = folder if "/" in folder else str(tmp_path / folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_base(section(model))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_missing_model_is_not_reported_as_a_missing_tokenizer() -> None:
    with pytest.raises(
        ModelError, match="cannot load 'someone/no-such-model': the hub cannot be reached or has"
    ):
        load_tokenizer(Base(model="someone/no-such-model"))
