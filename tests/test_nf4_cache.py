"""Quantized bases in the cache: reloading gives the same bits, and only for the same checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qlora.model.load
from qlora.errors import ModelError
from qlora.model import nf4_cache
from qlora.model.load import load_base
from qlora.quantization import nf4
from qlora.recipe import Base
from qlora.storage import cache, manifest


@pytest.fixture(autouse=True)
def _keep_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "WORTH_BYTES", 0)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record one line each time that a checkpoint is quantized."""
    log: list[str] = []
    read = qlora.model.load._read

    def logged(base: Base, *rest: Any, quantize: bool, **settings: Any) -> Any:
        if quantize:
            log.append(base.model)
        return read(base, *rest, quantize=quantize, **settings)

    monkeypatch.setattr(qlora.model.load, "_read", logged)
    return log


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny Llama that a test can change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def section(model: Path | str, **keys: Any) -> Base:
    return Base(model=str(model), **{"compute_dtype": "float32", **keys})


def uncached(base: Base, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    with monkeypatch.context() as patch:
        patch.setenv("QLORA_CACHE", "off")
        return load_base(base)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the model: parameters, statistics and buffers, saved or not."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_same(found: Any, made: Any) -> None:
    ours, theirs = tensors(found), tensors(made)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(
            tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)
        ), name
    assert [(n, type(m), m.training) for n, m in found.named_modules()] == [
        (n, type(m), m.training) for n, m in made.named_modules()
    ]
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in made.parameters()]
    assert found.generation_config.to_dict() == made.generation_config.to_dict()
    settings = [model.config.to_dict() for model in (found, made)]
    for setting in settings:
        setting["quantization_config"].pop("block_size", None)  # each weight has its own
    assert settings[0] == settings[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_second_start_reads_the_same_bits(
    tiny_llama: Path,
    quantized: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    block_size: int,
    double_quant: bool,
) -> None:
    base = section(tiny_llama, compute_dtype=dtype, block_size=block_size, double_quant=double_quant)
    expected = uncached(base, monkeypatch)
    assert_same(load_base(base), expected)
    assert len(quantized) == 2
    random_state = torch.get_rng_state()
    found = load_base(base)
    assert len(quantized) == 2, "the cached base was not used"
    assert_same(found, expected)
    assert torch.equal(torch.get_rng_state(), random_state), "the random state must not change"
    state = nf4.quant_state(found.get_submodule("model.layers.0.mlp.up_proj"))  # type: ignore[arg-type]
    assert state is not None
    assert (state.blocksize, state.nested) == (block_size, double_quant)
    ids = torch.arange(12)[None]
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "tied embeddings, fp32 scalings": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=32)),
    "norms of q and k": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32)),
    "fused experts": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)),
    "transposed linears": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(
    tmp_path: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    ARCHITECTURES[architecture]().save_pretrained(tmp_path / "model")
    base = section(tmp_path / "model", compute_dtype="bfloat16")
    expected = uncached(base, monkeypatch)
    load_base(base)
    assert_same(load_base(base), expected)
    assert len(quantized) == 2


def test_a_checkpoint_can_have_several_files(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "_SHARD", "100KB")
    expected = load_base(section(llama))
    (entry,) = cache.entries()
    assert len(list(entry.path.glob("*.safetensors"))) > 1
    assert_same(load_base(section(llama)), expected)


def perturb(folder: Path) -> None:
    """Write other weights of the same shapes, in a file of the same size."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})


def test_each_checkpoint_and_setting_has_its_own(
    llama: Path, tmp_path: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [
        section(llama, block_size=128),
        section(llama, double_quant=False),
        section(llama, compute_dtype="bfloat16"),
        section(shutil.copytree(llama, tmp_path / "copy")),
    ]
    for count, base in enumerate([section(llama), *changed], 1):
        load_base(base)
        load_base(base)
        assert len(quantized) == count
    perturb(llama)
    assert_same(load_base(section(llama)), uncached(section(llama), monkeypatch))
    assert len(quantized) == count + 2
    monkeypatch.setattr(cache, "version", lambda library: "0")
    load_base(section(llama))
    assert len(quantized) == count + 3


def test_changed_weights_with_an_old_modification_time_are_noticed(
    llama: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_cache, "_END_BYTES", 4096)
    file = llama / "model.safetensors"
    before = file.stat()
    load_base(section(llama))
    with file.open("r+b") as stream:  # a byte in the middle of the file
        stream.seek(before.st_size // 2)
        stream.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    load_base(section(llama))
    assert len(quantized) == 2


def test_the_tokenizer_is_not_part_of_the_key(llama: Path) -> None:
    load_base(section(llama))
    (entry,) = cache.entries()
    assert not list(entry.path.glob("tokenizer*"))
    assert entry.about == f"{llama}, blocks of 64, double quantization, for cpu"


def test_bases_that_are_not_quantized_here_are_not_cached(llama: Path, tmp_path: Path) -> None:
    load_base(section(llama, quantization="none"))
    load_base(section(llama, init="random"))
    load_base(section(llama, init="synthetic"))
    load_base(section(llama, trust_remote_code=True))
    assert cache.entries() == []
    load_base(section(llama)).save_pretrained(tmp_path / "quantized")
    assert len(cache.entries()) == 1
    load_base(section(tmp_path / "quantized"))
    assert len(cache.entries()) == 1


def test_small_bases_are_not_cached(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = nf4_cache._bytes(LlamaForCausalLM.from_pretrained(llama))
    assert size == sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_CACHE", str(llama.parent / "cache"))
    assert size < nf4_cache.WORTH_BYTES
    load_base(section(llama))
    assert cache.entries() == []


def test_a_damaged_base_is_quantized_again(llama: Path, quantized: list[str]) -> None:
    expected = load_base(section(llama))
    (entry,) = cache.entries()
    with (entry.path / "model.safetensors").open("r+b") as stream:
        stream.seek(-100, 2)
        stream.write(b"\1")
    assert_same(load_base(section(llama)), expected)
    assert_same(load_base(section(llama)), expected)
    assert len(quantized) == 2


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_or_unfitting_tensors_are_never_made_up(
    llama: Path, quantized: list[str], caplog: pytest.LogCaptureFixture, change: str
) -> None:
    expected = load_base(section(llama))
    (entry,) = cache.entries()
    weights = load_file(entry.path / "model.safetensors")
    if change == "missing":
        del weights["model.norm.weight"]
    else:
        weights["model.layers.7.mlp.gate_proj.weight"] = torch.zeros(4)
    save_file(weights, entry.path / "model.safetensors", metadata={"format": "pt"})
    (entry.path / "manifest.json").unlink()
    manifest.write(entry.path, about="whole, but of another model")
    assert_same(load_base(section(llama)), expected)
    assert len(quantized) == 2
    assert f"{change}_keys" in caplog.text


def test_a_hub_id_is_identified_by_its_commit(
    llama: Path, tmp_path: Path, quantized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the hub's own cache on disk, as a download leaves it."""
    import huggingface_hub.constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    repository = hub / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for number, commit in enumerate(["a" * 40, "b" * 40], 1):
        shutil.copytree(llama, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        assert nf4_cache._identity("some/model", "main") == commit
        load_base(section("some/model"))
        load_base(section("some/model"))
        assert len(quantized) == number
    load_base(section("some/model", revision="a" * 40))
    assert len(quantized) == 2
    assert nf4_cache._identity("some/other", "main") is None


@pytest.mark.parametrize("damage", ["short", "dangling"])
def test_a_base_that_cannot_be_loaded_gives_the_same_error(llama: Path, damage: str) -> None:
    weights = llama / "model.safetensors"
    if damage == "short":
        weights.write_bytes(b"short")
    else:
        weights.unlink()
        weights.symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_base(section(llama))
    assert cache.entries() == []
