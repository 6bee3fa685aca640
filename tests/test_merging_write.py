"""Merged checkpoints: the contents of the files, and loading them with other libraries."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs_for_tests import finished_run, update
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import byte_level
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.architectures import tiny
from qlora.adapter import LoRALinear, LoraSpec, adapt, lora_layers, save_adapter
from qlora.data import Prompts, encode_prompt
from qlora.errors import ModelError, UsageError
from qlora.inference.load import load_trained
from qlora.merging import merge as merging
from qlora.merging.write import MergeSource, write_merged
from qlora.model.load import load_base, meta_base
from qlora.model.prepare import apply_adapter
from qlora.quantization import nf4
from qlora.recipe import Base, Data, Recipe
from qlora.storage import tensor_file
from qlora.storage.safetensors_files import ShardReader, ShardWriter

IDS = torch.arange(12)[None] * 5
RecipeFile = Callable[..., Path]


@pytest.fixture
def recipe(recipe_file: RecipeFile) -> Recipe:
    return Recipe.load(recipe_file(base={"compute_dtype": "float32"}))


def prompts_of(recipe: Recipe) -> Prompts:
    return Prompts(recipe.data, AutoTokenizer.from_pretrained(recipe.base.model))


def merged(recipe: Recipe, adapter: Path, onto: Any, folder: Path) -> dict[str, Tensor]:
    write_merged(MergeSource(recipe.base, adapter), onto, folder, prompts_of(recipe))
    return dict(ShardReader(folder))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_original_adds_to_the_16_bit_weights_and_rounds_once(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe, targets="attention")
    stored = load_file(Path(recipe.base.model) / "model.safetensors")
    layers = lora_layers(load_trained(run).model)
    tensors = merged(recipe, run / "adapter", "original", tmp_path / "m")
    assert tensors.keys() == stored.keys()
    for key, tensor in tensors.items():
        layer = layers.get(key.removesuffix(".weight"))
        weight = stored[key] if layer is None else layer.merged_weight(stored[key])
        expected = weight.bfloat16()
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), key


def test_dequantized_is_the_live_model_rounded_once(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe, targets="attention")
    live = load_trained(run).model
    tensors = merged(recipe, run / "adapter", "dequantized", tmp_path / "m")
    for name, module in live.named_modules():
        if isinstance(module, LoRALinear):
            assert torch.equal(tensors[f"{name}.weight"], module.merged_weight().bfloat16()), name
        elif nf4.is_nf4(module) and not name.endswith(".base"):
            whole = nf4.dequantize(module.weight, module.quant_state, torch.float32)
            assert torch.equal(tensors[f"{name}.weight"], whole.bfloat16()), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert (logits(plain) - logits(live)).abs().max() < 0.02


@pytest.mark.parametrize("block_size", [64, 256])
def test_nf4_quantizes_the_sum_again_and_loads_back(
    recipe_file: RecipeFile, block_size: int, tmp_path: Path
) -> None:
    base = {"compute_dtype": "float32", "block_size": block_size}
    recipe = Recipe.load(recipe_file(base=base))
    run = finished_run(recipe, targets=["q_proj", "down_proj"])
    live = load_trained(run).model
    merged(recipe, run / "adapter", "nf4", tmp_path / "m")
    ours = load_base(Base(model=str(tmp_path / "m"), compute_dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for name, module in ours.named_modules():
        if not nf4.is_nf4(module):
            continue
        layer = live.get_submodule(name)
        if isinstance(layer, LoRALinear):
            again = nf4.quantize(layer.merged_weight(), block_size=block_size)
        else:  # unchanged weights are not quantized a second time
            again = layer.weight
        assert torch.equal(module.weight, again), name
        assert torch.equal(module.weight.quant_state.absmax, again.quant_state.absmax), name
        assert module.weight.quant_state.blocksize == block_size
        assert type(theirs.get_submodule(name)) is nf4.Linear4bit
    assert theirs.dtype == torch.bfloat16
    if block_size > 64:  # rows of 64: bitsandbytes' own forward fails where a block crosses rows
        nf4.use_nf4_linears(theirs)
    assert (logits(theirs) - logits(ours)).abs().max() < 0.05


@pytest.mark.parametrize("onto", ["nf4", "dequantized"])
def test_layers_that_a_checkpoint_excludes_stay_dense(
    tiny_llama: Path, recipe_file: RecipeFile, onto: str, tmp_path: Path
) -> None:
    excluding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "model.layers.0"],
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=excluding)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    recipe = Recipe.load(recipe_file(base={"model": str(tmp_path / "base"), "compute_dtype": "float32"}))
    run = finished_run(recipe, targets=["q_proj"])
    merged(recipe, run / "adapter", onto, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(theirs.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert nf4.is_nf4(theirs.model.layers[1].self_attn.q_proj) == (onto == "nf4")
    assert (logits(theirs) - logits(load_trained(run).model)).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["llama stored as bf16", "gpt2 without its first layer"])
@pytest.mark.parametrize("onto", ["nf4", "dequantized"])
def test_other_forms_of_nf4_checkpoints_are_trained_and_merged(kind: str, onto: Any, tmp_path: Path) -> None:
    """bitsandbytes can store packed bytes as another dtype, and quantizes GPT-2's Conv1D transposed."""
    torch.manual_seed(0)
    llama = kind.startswith("llama")
    small = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1}
    if llama:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**small, **sizes))
        changes: dict[str, Any] = {"bnb_4bit_quant_storage": torch.bfloat16}
    else:
        model = GPT2LMHeadModel(GPT2Config(**small, n_embd=64, n_layer=2, n_head=2, n_positions=64))
        changes = {"llm_int8_skip_modules": ["lm_head", "h.0"]}
    model.save_pretrained(tmp_path / "whole")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **changes)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=quantization)
    stored.save_pretrained(tmp_path / "base")
    byte_level().save_pretrained(tmp_path / "base")
    base = Base(model=str(tmp_path / "base"), compute_dtype="float32")
    spec = LoraSpec(targets=["q_proj", "down_proj"] if llama else ["c_attn", "mlp.c_proj"])
    live = update(adapt(load_base(base), spec))
    save_adapter(live, tmp_path / "adapter")
    prompts = Prompts(Data(source="-", format="completion"), byte_level())
    source = MergeSource(base, tmp_path / "adapter")
    write_merged(source, onto, tmp_path / "m", prompts)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    packed = sum(nf4.is_nf4(module) for module in plain.modules())
    assert packed == (sum(nf4.is_nf4(module) for module in live.modules()) if onto == "nf4" else 0)
    assert (logits(plain) - logits(live)).abs().max() < {"dequantized": 0.05, "nf4": 1.0}[onto]


def test_a_base_can_be_an_nf4_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    merged(recipe, run / "adapter", "nf4", tmp_path / "base")
    on_nf4 = recipe.model_copy(
        update={
            "base": recipe.base.model_copy(update={"model": str(tmp_path / "base")}),
            "output": str(tmp_path / "second"),
        }
    )
    run = finished_run(on_nf4, seed=1, targets=["q_proj", "down_proj"])
    live = load_trained(run).model
    source = MergeSource(on_nf4.base, run / "adapter")
    assert source.choices == ("dequantized", "nf4")
    for onto, tolerance in {"dequantized": 0.02, "nf4": 1.0}.items():
        merged(on_nf4, run / "adapter", onto, tmp_path / onto)
        back = load_base(
            Base(
                model=str(tmp_path / onto),
                quantization="nf4" if onto == "nf4" else "none",
                compute_dtype="float32",
            )
        )
        assert (logits(back) - logits(live)).abs().max() < tolerance
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(ShardReader(tmp_path / "nf4")[untouched], ShardReader(tmp_path / "base")[untouched])


def test_a_base_that_was_not_quantized(recipe_file: RecipeFile, tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file(base={"quantization": "none", "compute_dtype": "float32"}))
    run = finished_run(recipe)
    assert MergeSource(recipe.base, run / "adapter").choices == ("original", "nf4")
    live = load_trained(run).model
    merged(recipe, run / "adapter", "original", tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert (logits(plain) - logits(live)).abs().max() < 0.02


@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_a_linear_that_was_trained_as_a_whole_is_written(
    recipe_file: RecipeFile, onto: Any, tmp_path: Path
) -> None:
    settings = {"targets": "attention", "train_modules": ["down_proj"]}
    base = {"quantization": "none", "compute_dtype": "bfloat16"}
    recipe = Recipe.load(recipe_file(base=base, adapter=settings))
    model = update(apply_adapter(load_base(recipe.base), recipe))
    name = "model.layers.0.mlp.down_proj"
    trained = model.get_submodule(name).weight
    with torch.no_grad():
        trained.mul_(-1)
    save_adapter(model, tmp_path / "adapter")
    tensors = next(
        tensors
        for tensors in MergeSource(recipe.base, tmp_path / "adapter").tensors(onto)
        if f"{name}.weight" in tensors
    )
    expected = (
        {"": trained.detach()} if onto == "original" else nf4.to_tensors(nf4.quantize(trained.detach()))
    )
    assert torch.equal(tensors[f"{name}.weight"], expected[""])


def test_tensors_in_another_dtype_on_purpose_keep_it(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(recipe.base.model, folder)
    stored = {key: tensor.half() for key, tensor in load_file(folder / "model.safetensors").items()}
    stored["model.layers.0.mlp.routing_bias"] = torch.randn(4)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    base = recipe.base.model_copy(update={"model": str(folder)})
    recipe = recipe.model_copy(update={"base": base})
    tensors = merged(recipe, finished_run(recipe) / "adapter", "original", tmp_path / "m")
    bias = tensors.pop("model.layers.0.mlp.routing_bias")
    assert torch.equal(bias, stored["model.layers.0.mlp.routing_bias"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [in, out], and its hub checkpoint omits the decoder's prefix from the names."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    stored = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "gpt2")
    base = Base(model=str(tmp_path / "gpt2"), compute_dtype="float32")
    live = update(adapt(load_base(base), LoraSpec(targets=["c_attn", "mlp.c_proj"])))
    save_adapter(live, tmp_path / "adapter")
    prompts = Prompts(Data(source="-", format="completion"), tokenizer)
    for onto, tolerance in {"original": 1.0, "dequantized": 0.05, "nf4": 1.0}.items():
        source = MergeSource(base, tmp_path / "adapter")
        write_merged(source, onto, tmp_path / onto, prompts)  # type: ignore[arg-type]
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / onto)
        assert (logits(plain) - logits(live)).abs().max() < tolerance, onto
    assert load_file(tmp_path / "original" / "model.safetensors").keys() == stored.keys()


def test_layers_that_share_a_tensor_of_the_files_are_merged_into_it(tmp_path: Path) -> None:
    """HRM's files hold gate and up in one tensor, and so the gate, queries, keys and values of attention."""
    pytest.importorskip("transformers.models.hrm_text")
    torch.manual_seed(0)
    base = Base(model=str(tmp_path / "hrm"), compute_dtype="float32")
    AutoModelForCausalLM.from_config(tiny.config("hrm_text"), dtype=torch.float32).save_pretrained(base.model)
    stored = load_file(tmp_path / "hrm" / "model.safetensors")
    key = "model.H_module.layers.0.attn.gqkv_proj.weight"
    assert key in stored
    byte_level().save_pretrained(base.model)
    live = update(adapt(load_base(base), LoraSpec(rank=4)))
    before = logits(load_base(base))
    save_adapter(live, tmp_path / "adapter")
    source = MergeSource(base, tmp_path / "adapter")
    assert source.choices == ("original", "dequantized")
    assert source.stacked in stored
    prompts = Prompts(Data(source="-", format="completion"), byte_level())
    for onto in source.choices:
        write_merged(source, onto, tmp_path / onto, prompts)
    files = load_file(tmp_path / "dequantized" / "model.safetensors")
    assert {name: one.shape for name, one in files.items()} == {
        name: one.shape for name, one in stored.items()
    }
    attention = live.get_submodule("model.H_module.layers.0.self_attn")
    layers = [getattr(attention, f"{one}_proj") for one in ("gate", "q", "k", "v")]
    with torch.no_grad():
        expected = torch.cat([layer.merged_weight() for layer in layers])
    assert torch.equal(files[key], expected.bfloat16())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantized", dtype=torch.float32)
    effect = (logits(live) - before).abs().max()
    assert (logits(plain) - logits(live)).abs().max() < 0.2 * effect
    with pytest.raises(UsageError, match="hold several layers in one tensor, such as model"):
        merging._sources(
            SimpleNamespace(base=base), tmp_path / "adapter", "nf4", None, torch.device("cpu"), False
        )


def test_a_checkpoint_whose_names_are_older_than_the_model_keeps_them(recipe: Recipe, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 2048}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    folder = tmp_path / "gemma"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_level(bos=True).save_pretrained(folder)
    base = recipe.base.model_copy(update={"model": str(folder)})
    data = recipe.data.model_copy(update={"template": "plain"})
    recipe = recipe.model_copy(update={"base": base, "data": data})
    run = finished_run(recipe, targets=[".*language_model.*q_proj"])
    files = merged(recipe, run / "adapter", "original", tmp_path / "m")
    before = load_file(folder / "model.safetensors")
    assert files.keys() == before.keys()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    spec = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for layer in range(2):
        stem = f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.lora_"
        a, b = (adapter[f"{stem}{letter}.weight"].float() for letter in "AB")
        name = f"language_model.model.layers.{layer}.self_attn.q_proj.weight"
        expected = before[name] + spec["lora_alpha"] / spec["r"] * b @ a
        torch.testing.assert_close(files[name], expected.bfloat16(), rtol=0.01, atol=1e-5)
        assert not torch.equal(files[name], before[name].bfloat16())


def test_a_large_model_is_written_in_shards(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(recipe)
    whole = merged(recipe, run / "adapter", "dequantized", tmp_path / "whole")
    held: list[int] = []
    save = tensor_file.write
    monkeypatch.setattr(
        tensor_file,
        "write",
        lambda path, tensors, *rest: (
            held.append(sum(t.nbytes for t in tensors.values())),
            save(path, tensors, *rest),
        ),
    )
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (60_000,))
    sharded = merged(recipe, run / "adapter", "dequantized", tmp_path / "sharded")
    largest = max(tensor.nbytes for tensor in whole.values())
    assert len(held) > 3
    assert all(size <= 60_000 or size == largest for size in held)  # a shard over the limit holds one tensor
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in sharded.items())
    names = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(held):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(held)
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "sharded")]
    assert torch.equal(*map(logits, both))
    # and the shards can be loaded as a base
    again = recipe.base.model_copy(update={"model": str(tmp_path / "sharded")})
    assert MergeSource(again, run / "adapter", any_base=True).keys


def test_tokenizer_template_and_answer_ends_are_saved(
    recipe: Recipe, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    tokenizer = byte_level(bos=True, chatml=True)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("about the base")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 0.5}')
    base = recipe.base.model_copy(update={"model": str(folder)})
    data = recipe.data.model_copy(update={"template": "chatml"})
    recipe = recipe.model_copy(update={"base": base, "data": data})
    run = finished_run(recipe)
    merged(recipe, run / "adapter", "original", tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    question = [{"role": "user", "content": "Where is the cat?"}]
    posed = theirs.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert posed == encode_prompt("Where is the cat?", data, tokenizer)
    assert posed[0] == tokenizer.bos_token_id
    settings = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert settings == {"eos_token_id": sorted({1, *ends}), "top_p": 0.5}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == sorted({1, *ends})
    assert theirs.eos_token == "<|im_end|>"
    assert not (tmp_path / "m" / "README.md").exists()


def test_a_base_without_templates_keeps_none(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    merged(recipe, run / "adapter", "original", tmp_path / "m")
    own = (Path(recipe.base.model) / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "m" / "tokenizer_config.json").read_bytes() == own
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_the_skeleton_lists_the_layers_that_loading_quantizes(tiny_llama: Path) -> None:
    base = Base(model=str(tiny_llama))
    bones = meta_base(base)
    live = load_base(base)
    assert bones.quantized == {name for name, module in live.named_modules() if nf4.is_nf4(module)}
    assert all(parameter.is_meta for parameter in bones.model.parameters())


def test_a_misfit_is_reported_before_anything_is_written(recipe: Recipe, tmp_path: Path) -> None:
    run = finished_run(recipe)
    folder = tmp_path / "base"
    shutil.copytree(recipe.base.model, folder)
    base = recipe.base.model_copy(update={"model": str(folder)})
    file = folder / "model.safetensors"
    stored = load_file(file)
    assert MergeSource(base, run / "adapter").keys  # the same weights under another name are accepted
    save_file({key: tensor + 1 for key, tensor in stored.items()}, file)
    with pytest.raises(ModelError, match=r"was trained on .*tiny-llama.*differ in weights"):
        MergeSource(base, run / "adapter")
    assert MergeSource(base, run / "adapter", any_base=True).keys
    save_file({f"other.{key}": tensor for key, tensor in stored.items()}, file)
    with pytest.raises(ModelError, match=r"\(model.layers.0.mlp.down_proj.*\) have no weight of their own"):
        MergeSource(base, run / "adapter", any_base=True)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model.safetensors: missing or damaged"):
        MergeSource(base, run / "adapter", any_base=True)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model.safetensors .*: its weights are in pytorch_model.bin"):
        MergeSource(base, run / "adapter", any_base=True)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002.safetensors: missing or damaged"):
        MergeSource(base, run / "adapter", any_base=True)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        MergeSource(base, run / "adapter", any_base=True)
