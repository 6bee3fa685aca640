"""Adds our block size to transformers' bitsandbytes loader, leaves routers dense, and checks the loaded model."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qlora.errors import ModelError, RecipeError
from qlora.quantization import nf4
from qlora.quantization.expert_stack import PROJECTIONS, as_parameter, expert_parameters, is_experts, quantize
from qlora.quantization.mxfp4 import conversions
from qlora.quantization.read_weights import read_layers
from qlora.quantization.routers import routers
from qlora.quantization.stored_form import why_another_weight, why_not_whole
from qlora.recipe import Base
from qlora.runtime.patches import quantizer_replaced

OnWeight = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""called with a layer's name, its weight [out, in] before it is stored, and a function that returns the values of a
weight after it is stored (dequantized, if it is quantized); returns the weight to store"""


def nf4_config(base: Base, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration for the recipe's NF4 base, with compute dtype `dtype`.

    `from_pretrained` uses its block size only within `block_size_applied`.
    """
    return _BlockSizedNF4Config(
        block_size=base.block_size,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def nf4_layers(model: PreTrainedModel, config: Any = None) -> list[str]:
    """Return the names of the linear layers that loading quantizes to NF4, in the order of the model.

    transformers quantizes `nn.Linear` and GPT-2's `Conv1D`, but no subclass of `nn.Linear`. It leaves out the output
    head, and the layers that an NF4 checkpoint lists. We also leave out routers and `read_layers`.

    Args:
        model: an unquantized model, which can be on the meta device.
        config: quantization config of the checkpoint, if the checkpoint is in NF4 already.
    """
    skipped = skipped_modules(model) if config is None else _settings(config).get("llm_int8_skip_modules")
    patterns = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, patterns)
    ]


def nf4_experts(model: PreTrainedModel, config: Any = None) -> list[str]:
    """Return the names of the experts' projections that loading quantizes to NF4; arguments as in `nf4_layers`.

    An NF4 checkpoint has them in NF4 or in 16 bits. Those that it lists as excluded stay in 16 bits.
    """
    skipped = None if config is None else _settings(config).get("llm_int8_skip_modules")
    return [
        name
        for name, _ in expert_parameters(model)
        if all(should_convert_module(part, skipped) for part in (name, name.rpartition(".")[0]))
    ]


def skipped_modules(model: PreTrainedModel) -> list[str] | None:
    """Return the modules that quantization must leave out: transformers' own choice, routers, and `read_layers`.

    None means transformers' own choice alone.
    """
    found = routers(model) | read_layers(model)
    return [*get_keys_to_not_convert(model), *sorted(found)] if found else None


def overruled_settings(base: Base, config: Any) -> list[str]:
    """Return a sentence for each setting of the recipe that an NF4 checkpoint overrules with its own.

    Args:
        base: the recipe's `base` section.
        config: transformers' configuration of the model, with the quantization config of an NF4 checkpoint, or without.
    """
    own = _own_settings(config)
    return [
        f"base.{key}={_yaml(getattr(base, key))} has no effect: {base.model!r} is quantized already, with "
        f"{key}={_yaml(value)}"
        for key, value in own.items()
        if getattr(base, key) != value
    ]


def as_stored(base: Base, config: Any) -> Base:
    """Return the `base` section with the settings of an NF4 checkpoint in place of those that it overrules."""
    return base.model_copy(update=_own_settings(config))


def _own_settings(config: Any) -> dict[str, Any]:
    """Return an NF4 checkpoint's own values of `double_quant` and `block_size`; empty for other checkpoints."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    settings = _settings(stored)
    return {
        "double_quant": bool(settings.get("bnb_4bit_use_double_quant", False)),
        "block_size": settings.get("block_size", 64),
    }


def _settings(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict()


def _yaml(value: object) -> str:
    return str(value).lower()


def block_size_applied(
    on_weight: OnWeight | None = None, *, mxfp4: bool = False
) -> AbstractContextManager[None]:
    """Return a context in which `from_pretrained` quantizes with the block size of an `nf4_config`.

    on_weight: called for each weight before it is quantized; None changes nothing.
    mxfp4: True if the checkpoint's experts are in MXFP4.
    """
    reads = {"on_weight": staticmethod(on_weight) if on_weight else None, "mxfp4": mxfp4}
    return quantizer_replaced("bitsandbytes_4bit", type("NF4Quantizer", (_BlockSizedNF4Quantizer,), reads))


def require_nf4(base: Base, config: Any) -> None:
    """Check that an already quantized checkpoint is NF4, and that the recipe asks for NF4.

    Args:
        base: the recipe's `base` section.
        config: the checkpoint's own quantization config.

    Raises:
        ModelError: The checkpoint is not quantized to NF4 by bitsandbytes.
        RecipeError: The recipe sets another quantization.
    """
    settings = _settings(config)
    method = settings.get("quant_method", "unknown")
    kind = settings.get("bnb_4bit_quant_type")
    if not (str(method).endswith("bitsandbytes") and settings.get("load_in_4bit") and kind == "nf4"):
        raise ModelError(
            f"base.model: {base.model!r} is already quantized by {method} ({kind or 'not NF4'}). "
            "Use its 16-bit version, or a version quantized to NF4 by bitsandbytes"
        )
    if base.quantization != "nf4":
        raise RecipeError(f"base.model: {base.model!r} is an NF4 checkpoint; set base.quantization=nf4")


def cast_dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the unquantized weights of an NF4 checkpoint to `dtype`, in place.

    transformers 5.23 leaves them in the file's dtype, so the dtypes of head and norms differ from the rest.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    packed = {
        module.weight for module in model.modules() if nf4.is_nf4(module)
    }  # bytes, in any storage dtype
    for name, parameter in model.named_parameters():
        numbers = parameter.is_floating_point() and parameter not in packed
        if numbers and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


class _BlockSizedNF4Config(BitsAndBytesConfig):
    """bitsandbytes' configuration with a block size, which transformers fixes at bitsandbytes' default of 64."""

    def __init__(self, block_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size


class _BlockSizedNF4Quantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit loader that leaves out routers and sets the block size of each weight before quantization."""

    on_weight: OnWeight | None = None
    mxfp4: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []
        """of weights that are not the model's"""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.problems:
            more = f" ({len(self.problems) - 1} more)" * (len(self.problems) > 1)
            raise ModelError(f"{self.problems[0]}{more}. Restore the files, or download the model again")
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_weight_conversions(self) -> list[WeightConverter]:
        own: list[WeightConverter] = super().get_weight_conversions()
        return [*own, *conversions(self)] if self.mxfp4 else own

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return super().param_needs_quantization(model, param_name, **kwargs) or (
            not self.pre_quantized and _is_projection(model, param_name)
        )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if (
            not self.pre_quantized
        ):  # the names become part of a saved checkpoint's config, so it loads without us
            self.quantization_config.llm_int8_skip_modules = skipped_modules(model)
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        block_size = getattr(self.quantization_config, "block_size", 64)
        for module in model.modules():
            if nf4.is_nf4(module):
                module.weight.blocksize = block_size

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _ReadingQuantize(self) if self.on_weight is not None else _Quantize(self)


def leaving_out(choose: Callable[[PreTrainedModel], Collection[str]]) -> AbstractContextManager[None]:
    """Return a context in which `from_pretrained` builds an NF4 model without some of its parameters.

    choose: called with the model on the meta device; returns the names of the parameters.
    """
    own = {"choose": staticmethod(choose)}
    return quantizer_replaced("bitsandbytes_4bit", type("PartialQuantizer", (_PartialQuantizer,), own))


class _PartialQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit loader for a checkpoint of which a part is read elsewhere."""

    choose: Callable[[PreTrainedModel], Collection[str]]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        for name in list(self.choose(model)):
            module, own = get_module_from_name(model, name)
            # a model's code can initialise it, so an attribute takes its place; it is no part of the state
            module.__dict__[own] = module._parameters.pop(own)
            module._is_hf_initialized = True  # nothing is left that a model initialises
        super()._process_model_before_weight_loading(model, *args, **kwargs)


def add_left_out(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    """Give a model a parameter that it was built without, see `leaving_out`."""
    module, own = get_module_from_name(model, name)
    module.__dict__.pop(own, None)
    module.register_parameter(own, parameter)


def _is_projection(model: nn.Module, parameter: str) -> bool:
    """Return True if this is the name of a projection in one of transformers' expert modules."""
    module, name = get_module_from_name(model, parameter)
    return name in PROJECTIONS and is_experts(module)


class _Quantize(Bnb4bitQuantize):
    """transformers' quantization of one weight, and that of the experts of a layer."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        config = self.hf_quantizer.quantization_config
        linears, result = {}, {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if (problem := _why_not(model, key, weight)) is not None:
                self.hf_quantizer.problems.append(problem)
                continue
            if not _is_projection(model, key):
                linears[key] = weight
                continue
            result[key] = as_parameter(quantize(weight, config.block_size, config.bnb_4bit_use_double_quant))
        return result | super().convert(linears, full_layer_name=full_layer_name, model=model, **kwargs)


def require_whole(model: nn.Module) -> None:
    """Check the 4-bit linears of a model from a checkpoint in NF4. Raises ModelError if one is damaged."""
    if (problem := next(_damaged_linears(model), None)) is not None:
        raise ModelError(f"{problem}. Restore the files, or download the model again")


def _damaged_linears(model: nn.Module) -> Iterator[str]:
    """Say of each 4-bit linear of a checkpoint in NF4 what is wrong with it."""
    for name, module in model.named_modules():
        if not nf4.is_nf4(module):
            continue
        state, shape = nf4.quant_state(module), (module.out_features, module.in_features)
        if state is None:
            yield (
                f"{name}.weight: the files have it in 16 bits, and llm_int8_skip_modules in config.json does not list "
                "it"
            )
        elif tuple(state.shape) != shape:
            yield f"{name}.weight: the files have {list(state.shape)} in 4 bits, and the model needs {list(shape)}"
        elif (problem := why_not_whole(module.weight, state)) is not None:
            yield f"{name}.weight: {problem}"


def _why_not(model: nn.Module, name: str, stored: Tensor) -> str | None:
    """Say why a tensor of the files is not the parameter `name` of `model`; None if it is.

    transformers compares the shapes of weights that it does not quantize only.
    """
    module, _ = get_module_from_name(model, name)
    expected = tuple(model.get_parameter(name).shape)
    if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):  # stored as [in, out]
        expected = expected[::-1]
    return why_another_weight(name, stored, expected)


class _ReadingQuantize(_Quantize):
    """transformers' quantization of one weight, which calls `on_weight` first."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        config, on_weight = self.hf_quantizer.quantization_config, self.hf_quantizer.on_weight
        stored = partial(
            nf4.rounded, block_size=config.block_size, double_quant=config.bnb_4bit_use_double_quant
        )
        kept = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            if _is_projection(model, key):
                kept[key] = weight
            elif issubclass(model.get_submodule(name).source_cls, Conv1D):  # stored as [in, out]
                kept[key] = on_weight(name, weight.T, stored).T
            else:
                kept[key] = on_weight(name, weight, stored)
        return super().convert(kept, full_layer_name=full_layer_name, model=model, **kwargs)
