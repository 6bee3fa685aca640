"""Loading of the base model, a causal language model with NF4 linear layers, and of its tokenizer.

    pretrained   weights from the hub or a folder. They are quantized tensor by tensor while transformers reads them,
                 so the full-precision model is never in memory, and cached for the next start (see `nf4_cache`).
                 Checkpoints in bitsandbytes NF4 load unchanged (their experts: see `prequantized`)
    synthetic    the architecture of a config.json with random NF4 weights made directly on the device: to measure
                 memory and speed without a download
    random       the architecture freshly initialised: for training from scratch

Everything except the quantized linears (embeddings, norms, the output head) is in the compute dtype.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.quantizers.auto import AutoHfQuantizer

from qlora import bundled
from qlora.adapter.architecture import architecture_of
from qlora.adapter.experts import use_expert_stacks
from qlora.adapter.identity import BaseIdentity, quantization_of
from qlora.adapter.initial import InitialValues
from qlora.adapter.targets import is_conv1d
from qlora.adapter.trained_rows import plain
from qlora.errors import ModelError, RecipeError, first_line, listed
from qlora.model import nf4_cache, prequantized, random_init
from qlora.model.base_files import damaged_config, damaged_tokenizer, damaged_weights
from qlora.model.load_problems import code_wanted, damage_named, load_problem
from qlora.model.locate import locate
from qlora.model.offload import HostEmbedding
from qlora.model.quiet import quiet
from qlora.model.varlen_attention import use_capped_attention
from qlora.quantization import nf4
from qlora.quantization.mxfp4 import is_mxfp4
from qlora.quantization.nf4_checkpoint import read_apart
from qlora.quantization.transformers_loader import (
    OnWeight,
    as_stored,
    block_size_applied,
    cast_dense,
    nf4_config,
    nf4_experts,
)
from qlora.recipe import Base
from qlora.runtime import gpu
from qlora.runtime.allocators import return_freed_memory
from qlora.runtime.device import multiplies_bfloat16, on_cuda
from qlora.storage.safetensors_files import find_checkpoint


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """Return the dtype of activations, norms and embeddings on `device`.

    `auto` means bfloat16 if the device multiplies bfloat16 in hardware, or else float32. float16 is no choice: its
    small range would need a scaled loss.
    """
    if base.compute_dtype != "auto":
        return getattr(torch, base.compute_dtype)
    in_hardware = multiplies_bfloat16() if device.type == "cpu" else gpu.has_bfloat16(device)
    return torch.bfloat16 if in_hardware else torch.float32


def load_config(base: Base) -> Any:
    """Load transformers' configuration of the model. Raises ModelError if it is missing or unusable."""
    location = locate(base)
    folder = Path(location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"base.model: the folder {location!r} has no config.json. Use the folder of a model")
    if folder.is_dir() and (problem := damaged_config(folder)) is not None:
        raise ModelError(f"base.model: {base.model!r}: {problem}. Restore the folder from a copy")
    with damage_named(base, lambda folder: None, "config.json"):
        config = AutoConfig.from_pretrained(
            location, revision=_revision(base), trust_remote_code=base.trust_remote_code
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"base.model: {base.model!r} is an encoder and a decoder ({config.model_type}; is_encoder_decoder is true "
            "in its config.json), and qlora trains causal language models only. Use one"
        )
    return prequantized.format_remembered(base, config)


def load_architecture(base: Base) -> nn.Module:
    """Build the model without its weights, on the meta device, to look up names and shapes."""
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(base), trust_remote_code=base.trust_remote_code)


def load_tokenizer(base: Base) -> Tokenizer:
    """Load the tokenizer of the base model.

    A synthetic or random base without a tokenizer gets the bundled one, because its output has no meaning anyway.

    Args:
        base: the recipe's `base` section.

    Raises:
        ModelError: the model has no tokenizer, or its tokenizer needs code that `base.trust_remote_code` forbids.

    Examples:
        >>> tokenizer = load_tokenizer(Recipe.load("quickstart").base)
    """
    location = locate(base)
    if (
        base.init != "pretrained"
        and not (Path(location) / "tokenizer.json").is_file()
        and Path(location).exists()
    ):
        location = str(bundled.path("bundled/base"))
    with damage_named(base, damaged_tokenizer, "tokenizer_config.json"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                location, revision=_revision(base), trust_remote_code=base.trust_remote_code
            )
            tokenizer.encode("text")  # some wrong settings fail only here
            return tokenizer
        except (OSError, ValueError, KeyError) as error:
            load_config(base)  # a model that is not there at all is reported as such
            if (Path(location) / "tokenizer.json").is_file() and not code_wanted(error):
                raise
            problem = code_wanted(error) or f"{first_line(error)}. Use a model that has a tokenizer.json"
            raise ModelError(f"base.model: no tokenizer in {base.model!r}: {problem}") from error


def load_base(
    base: Base,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    config: Any = None,
    initial: InitialValues | None = None,
) -> PreTrainedModel:
    """Load the base model and quantize it, or make it with random weights if the recipe requests that.

    Args:
        base: the recipe's `base` section.
        device: device of all parameters.
        seed: seed of the weights for `init: random` and `synthetic`.
        config: transformers' configuration; None means that of the base.
        initial: takes the initial values of an adapter from the 16-bit weights, and changes these if the values are
            those of PiSSA; None keeps all weights. One weight at a time is decomposed, on `device`, which needs several
            fp32 copies of it.

    Returns:
        The model on `device`, in training mode. No parameter of a quantized model is trainable.

    Raises:
        ModelError: the model is missing, unreadable, of an unknown architecture or quantized in another way.
        RecipeError: the model does not support the settings in `base`.

    Examples:
        >>> model = load_base(Recipe.load("quickstart").base, "cpu")
    """
    device = torch.device(device)
    config = load_config(base) if config is None else config
    prequantized.check_quantization(base, config)
    if initial is not None and base.init != "synthetic":
        _require_16_bit(base, config, initial)
        initial.choose(meta_model(base, config, compute_dtype(base, device)))
    torch.manual_seed(seed)
    build = {"pretrained": _pretrained, "synthetic": random_init.synthetic, "random": random_init.random}[
        base.init
    ]
    with quiet():
        model = build(base, config, device, compute_dtype(base, device), initial)
    use_capped_attention(model)
    if initial is not None:
        initial.read(model)
        model.initial_values = initial
    if base.embedding == "host" and on_cuda(next(model.parameters())):
        _embedding_to_host(model, device)
    nf4.use_nf4_linears(model)
    if base.quantization == "nf4":
        use_expert_stacks(model)
    model.base_identity = replace(
        _identity(base, model, seed), changed=None if initial is None else initial.changed
    )
    model.config.use_cache = False
    return model.train()


def _require_16_bit(base: Base, config: Any, initial: InitialValues) -> None:
    """Raise ModelError if the base is an NF4 checkpoint, whose 16-bit weights are gone."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"base.model: {base.model!r} is an NF4 checkpoint, and adapter.init: {initial.spec.init} reads the 16-bit "
            "weights. Use the 16-bit version of the model, or another adapter.init"
        )


def embedding_is_untied(model: PreTrainedModel) -> bool:
    """Return True if the input embedding can be in host memory: it is plain, and the output head does not share it."""
    embedding, head = plain(model.get_input_embeddings()), plain(model.get_output_embeddings())
    return type(embedding) is nn.Embedding and (head is None or head.weight is not embedding.weight)


def _embedding_to_host(model: PreTrainedModel, device: torch.device) -> None:
    if not embedding_is_untied(model):
        raise RecipeError(
            f"base.embedding: the input embedding of {type(model).__name__} cannot be in host memory: the output head "
            "shares it, or it does more than look up rows. Remove this key"
        )
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings().weight, device))


def meta_model(base: Base, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Build the unquantized model on the meta device, in training mode, for names, shapes and counts."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=base.trust_remote_code
        )
    use_capped_attention(model)
    return cast(PreTrainedModel, model.train())


def _identity(base: Base, model: PreTrainedModel, seed: int) -> BaseIdentity:
    """Return the base's fingerprint: digests of pretrained weights, or the seed of made-up ones; name and revision."""
    if base.init == "pretrained":
        identity = BaseIdentity.of(model)
    else:
        identity = BaseIdentity(
            weights=f"{base.init} of seed {seed}",
            quantization=quantization_of(model),
            architecture=architecture_of(model.config),
        )
    return replace(identity, name=base.model, revision=base.revision)


def _pretrained(
    base: Base, config: Any, device: torch.device, dtype: torch.dtype, on_weight: OnWeight | None = None
) -> PreTrainedModel:
    if getattr(config, "quantization_config", None) is None:
        quantize = base.quantization == "nf4"
        read = partial(_read, base, config, device, dtype, quantize=quantize, on_weight=on_weight)
    else:
        meta = meta_model(base, config, dtype)
        prequantized.check_experts(base, config, meta)
        quantize = bool(prequantized.quantized_on_reading(base, config, meta))
        read = partial(_read_nf4, base, config, device, dtype)
    # a cache key cannot cover foreign code, and the cache has no 16-bit weights to read
    if not quantize or base.trust_remote_code or on_weight is not None:
        return read()
    settings = as_stored(base, config)
    return nf4_cache.quantized(
        locate(base),
        _revision(base),
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        dtype=dtype,
        device=device,
        make=read,
    )


def _read_nf4(base: Base, config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint that is in NF4: its linears and other weights with transformers, its experts without."""
    settings = as_stored(base, config)
    with read_apart(
        checkpoint_folder(base), config.quantization_config, block_size=settings.block_size,
        double_quant=settings.double_quant, dtype=dtype, device=device,
    ) as add:  # fmt: skip
        return cast_dense(add(_loaded(base, device, dtype)), dtype)


def _read(
    base: Base,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantize: bool,
    on_weight: OnWeight | None = None,
) -> PreTrainedModel:
    """Load the checkpoint with transformers; if `quantize`, its linears are quantized on the way."""
    kwargs: dict[str, Any] = {"quantization_config": nf4_config(base, dtype)} if quantize else {}
    if is_mxfp4(config):
        kwargs = {"quantization_config": Mxfp4Config(dequantize=True), **kwargs}
        if quantize:
            kwargs["config"] = copy.deepcopy(config)  # without the checkpoint's own quantization
    with block_size_applied(on_weight, mxfp4=is_mxfp4(config)):
        model = _loaded(base, device, dtype, **kwargs)
    if quantize and device.type == "cpu":
        _let_go_of_the_files(model)
    return model


def _loaded(base: Base, device: torch.device, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """Load the checkpoint with transformers. Raises ModelError if files are damaged, or weights are missing."""
    with damage_named(base, damaged_weights, "config.json or generation_config.json"):
        model, report = AutoModelForCausalLM.from_pretrained(
            locate(base),
            revision=_revision(base),
            trust_remote_code=base.trust_remote_code,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **kwargs,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"base.model: {base.model!r} has no weights for {listed(missing)}, which its config.json asks for: "
            "config.json or model.safetensors is damaged, or they do not belong together. Restore the folder"
        )
    return cast(PreTrainedModel, model)


def _let_go_of_the_files(model: PreTrainedModel) -> None:
    """Copy the weights that were not quantized, in place, and return freed memory to the system.

    On a CPU transformers gives them as views of the mapped checkpoint. One of them would keep all pages of its file
    resident, most of which hold weights that are in NF4 now.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()
    return_freed_memory()


@dataclass(frozen=True)
class MetaBase:
    """A pretrained base without its weights."""

    model: PreTrainedModel
    """the model on the meta device; each layer that is quantized on loading is an `nn.Linear` here"""
    quantized: frozenset[str]
    """names of the linears that transformers quantizes to NF4 when it loads the base"""
    transposed: frozenset[str]
    """names of the linears that the original stores as [in, out] (Conv1D, as in GPT-2)"""
    experts: frozenset[str]
    """names of the projections of experts that loading quantizes to NF4"""
    prequantized: bool
    """True if the checkpoint itself is in NF4"""
    excluded: tuple[str, ...] | None
    """modules that the config of the NF4 form must list as not quantized; None: transformers' own choice"""


def meta_base(base: Base) -> MetaBase:
    """Build the model that `load_base` would load, from its configuration alone.

    `quantized` names the layers that NF4 would take even if the recipe leaves the base unquantized.

    Raises:
        ModelError: the configuration is missing, unknown, or quantized in another way.
    """
    config = load_config(base)
    prequantized.check_quantization(base, config)
    stored = getattr(config, "quantization_config", None)
    model = meta_model(base, config, torch.bfloat16)
    prequantized.check_experts(base, config, model)
    with quiet(), block_size_applied():
        quantizer = AutoHfQuantizer.from_config(
            stored or nf4_config(base, torch.bfloat16), pre_quantized=stored is not None
        )
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    excluded = quantizer.quantization_config.llm_int8_skip_modules
    replaced = {name: module for name, module in model.named_modules() if nf4.is_nf4(module)}
    for name, module in replaced.items():
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        model.set_submodule(name, linear)
    model.base_identity = replace(_identity(base, model, seed=0), quantization=None)
    experts = frozenset(nf4_experts(model, stored))
    transposed = {name for name, module in replaced.items() if module.source_cls.__name__ == "Conv1D"}
    transposed |= {name for name, module in model.named_modules() if is_conv1d(module)}
    return MetaBase(
        model, frozenset(replaced), frozenset(transposed), experts, stored is not None,
        None if excluded is None else tuple(excluded),
    )  # fmt: skip


def checkpoint_folder(base: Base) -> Path:
    """Return the folder with the files of a pretrained base, downloading a hub id that is not in the local cache.

    Raises:
        ModelError: the base is not pretrained, the hub has no such model, or the hub cannot be reached.
    """
    if base.init != "pretrained":
        raise ModelError(
            f"base.init is {base.init}: this base was made from a seed and has no files; use a pretrained base"
        )
    location = locate(base)
    try:
        return find_checkpoint(location, _revision(base), download=True)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors or ValueErrors
        raise ModelError(load_problem(base, error)) from error


def _revision(base: Base) -> str:
    return base.revision or "main"
