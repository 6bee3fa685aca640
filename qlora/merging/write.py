"""Writing of a merged model as one ordinary checkpoint: the base's files with an adapter added, tensor by tensor.

    original      what was learned added to the 16-bit weights that the base was quantized from: s (B A - B0 A0), if A
                  and B started at A0 and B0 from the base's weights (PiSSA, LoftQ), else the adapter
    dequantized   the adapter added to the dequantized NF4 weights, which it was trained with
    nf4           `dequantized`, quantized to NF4 again (for a base that was never quantized: `original`, quantized)

Sums are computed in fp32 (see `LoRALinear.merged_weight`). Tensors in the main dtype of the base's files are stored in
bf16, or in NF4 if the base has them in NF4. Tensors in another dtype (such as the fp32 routing bias of a mixture of
experts) are stored unchanged. Only one tensor and one shard are in memory at a time, and only the base's files are
read.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.adapted_linear import other_layers
from qlora.adapter.initial import Initial, InitialValues
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.store import load_adapter
from qlora.adapter.trained_parts import state_of, whole_modules
from qlora.adapter.trained_rows import TrainedRows
from qlora.data import Prompts
from qlora.data.prompt_files import write_prompt_files
from qlora.errors import ModelError, listed
from qlora.merging.parameter_names import ParameterNames
from qlora.model import load as bases
from qlora.quantization import nf4
from qlora.quantization.mxfp4 import BLOCKS, is_packed
from qlora.quantization.stored_parameters import StoredParameters
from qlora.quantization.transformers_loader import as_stored, nf4_config
from qlora.recipe import Base
from qlora.storage.folders import save_errors
from qlora.storage.json_files import read_object, write_object
from qlora.storage.safetensors_files import INDEX, ShardReader, ShardWriter

Onto = Literal["original", "dequantized", "nf4"]

# Files of the base's folder that also apply to the merged model. (Not the README, which describes the base.)
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
COMPANIONS = ("*.jinja", "generation_config.json", "LICENSE*", "NOTICE*")

FLOATS = ("BF16", "F16", "F32")

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""bytes of one weight in NF4 with double quantization, the recipe's default"""


@dataclass(frozen=True)
class _Matrix:
    """Merge of one matrix of the checkpoint."""

    name: str
    """name of the layer in the model"""
    adapted: AdaptedLayer | None
    """the layer's adapter, if it changes the weight"""
    initial: Initial | None
    """A and B before the first step, if they came from the base's weights"""
    quantized: bool
    """True if the base has it in NF4, or would if the base were quantized"""
    transposed: bool
    """True if stored as [in, out] where it is not packed, like GPT-2's Conv1D"""
    rows: slice | None = None
    """rows of the stored tensor, if it holds several matrices"""


class MergeSource:
    """Files of a base, and the adapter to add to them.

        >>> source = MergeSource(recipe.base, "runs/mine/adapter")
        >>> for tensors in source.tensors("dequantized"): ...

    The constructor reads the files' headers and the adapter, so that errors appear before anything is written.

    Raises:
        ModelError: files are missing or do not belong to the model; or the adapter does not fit it or was trained on
            other weights (accepted with `any_base`).
    """

    def __init__(
        self, base: Base, adapter: Path, device: torch.device | str = "cpu", *, any_base: bool = False
    ) -> None:
        self.device = torch.device(device)
        self.folder = bases.checkpoint_folder(base)
        self.reader = ShardReader(self.folder)
        meta_base = bases.meta_base(base)
        self.base = as_stored(base, meta_base.model.config)
        self.prequantized, self.excluded = meta_base.prequantized, meta_base.excluded
        load_adapter(meta_base.model, adapter, any_base=any_base)
        if others := other_layers(meta_base.model):
            raise ModelError(
                f"{adapter}: {listed(others)}: only linear layers are merged into files. Merge this adapter in memory, "
                "with qlora.merge_adapter"
            )
        self.replaced = None if self.prequantized else _replaced_in_4_bits(meta_base.model)
        """class of modules for which transformers has another one in 4-bit models; None if there is none"""
        self.matrices, self._stacked = self._locate(meta_base)
        self._experts = LoRAExperts.of(meta_base.model)
        self._quantized_experts = meta_base.experts if base.quantization == "nf4" else frozenset()
        projections = self._experts.keys() | self._quantized_experts
        self._expert_files = StoredParameters(meta_base.model, projections, self.reader)
        self._expert_files.require(projections)
        self._packed = self._expert_files.packed
        self._projections = {key: name for name in projections for key in self._expert_files.keys(name)}
        self.biases = self._locate_biases(meta_base.model)
        self.parts = self._locate_parts(meta_base.model)
        self.vocabulary = max((rows.size for rows in TrainedRows.of(meta_base.model).values()), default=None)
        """rows of the merged embedding; None if no token was trained"""
        statistics = {name for own in self._packed.statistics.values() for name in own}
        self.keys = [key for key in self.reader if key not in statistics]
        """names of the tensors in the files, without the statistics of 4-bit weights"""
        sizes: Counter[str] = Counter()
        for key in self.keys:
            sizes[self.reader.stored[key].dtype] += self.reader.stored[key].elements
        self._main_dtype = next((dtype for dtype, _ in sizes.most_common() if dtype in FLOATS), None)

    @property
    def choices(self) -> tuple[Onto, ...]:
        """Choices of weights that these files allow the adapter to be added to."""
        if self.prequantized:
            return ("dequantized", "nf4")
        nf4: tuple[Onto, ...] = () if self.replaced or self.stacked else ("nf4",)
        return ("original", "dequantized", *nf4) if self.base.quantization == "nf4" else ("original", *nf4)

    @property
    def stacked(self) -> str | None:
        """Name of a tensor with several layers that the base has in NF4; None if there is none.

        In NF4 each layer has blocks of its own, so such a tensor has no NF4 form.
        """
        return next(
            (key for key, found in self._stacked.items() if any(one.quantized for one in found)), None
        )

    def bytes(self, onto: Onto) -> int:
        """Estimate the size of the merged model's files in bytes."""
        total = 0.0
        for key in self.keys:
            elements = self.reader.stored[key].elements
            if key in self._packed:  # two codes a byte
                elements *= 2
            if is_packed(key):  # two codes a byte, and no exponents in 16 bits
                total += elements * 4 if key.endswith(BLOCKS) else 0
            elif onto == "nf4" and key in self.matrices and self.matrices[key].quantized:
                total += elements * NF4_BYTES
            else:
                total += elements * 2
        return int(total)

    def tensors(self, onto: Onto) -> Iterator[dict[str, Tensor]]:
        """Yield the stored tensors for each of `keys`: one tensor, or a 4-bit weight and its statistics."""
        for key in self.keys:
            matrix = self.matrices.get(key)
            if (
                name := self._projections.get(key)
            ) is not None:  # all tensors of a projection with its first one
                first = key == self._expert_files.keys(name)[0]
                yield self._expert_tensors(name, onto) if first else {}
            elif matrix is not None and (matrix.adapted is not None or matrix.quantized):
                yield self._matrix(key, matrix, onto)
            elif key in self._stacked:
                parts = [self._matrix(key, part, onto)[key] for part in self._stacked[key]]
                yield {key: torch.cat(parts)}
            else:
                tensor = self._dense(key)
                if key in self.biases:
                    tensor = self.biases[key].merged_bias(tensor)
                main = key in self._packed or self.reader.stored[key].dtype == self._main_dtype
                yield {key: tensor.bfloat16() if main else tensor}

    def _expert_tensors(self, name: str, onto: Onto) -> dict[str, Tensor]:
        """Return the tensors of a projection of experts, in 16 bits: transformers has no experts in NF4."""
        files, adapted = self._expert_files, self._experts.get(name)
        if onto != "original" and name in self._quantized_experts:
            # In the dtype in which transformers hands it to the quantizer when it loads the base
            dtype = bases.compute_dtype(self.base, self.device)
            own = self.base.block_size, self.base.double_quant
            matrices = files.quantized(name, *own, dtype, self.device).dense(torch.float32)
        else:
            matrices = files.read(name).to(self.device)
        if adapted is not None:
            matrices = adapted.merged_weight(matrices)
        return self._expert_files.stored(name, matrices.bfloat16())

    def _dense(self, key: str) -> Tensor:
        """Read a tensor, as it was trained beside the adapter if it was; dequantize it if it is packed."""
        if key in self._packed:  # a router, from a time in which it was a linear layer
            (weight,) = self._packed.read([key])
            tensor = nf4.dequantize(weight, weight.quant_state, torch.float32)
        else:
            tensor = self.reader[key]
        return self.parts[key](tensor).to(tensor.dtype) if key in self.parts else tensor

    def _matrix(self, key: str, matrix: _Matrix, onto: Onto) -> dict[str, Tensor]:
        weight, packed = self._read(key, matrix, as_trained=onto != "original")
        if matrix.adapted is not None:
            if packed is None and matrix.initial is not None:  # onto the 16-bit weights
                weight = weight.float() - matrix.initial.update(weight.float())
            weight = matrix.adapted.merged_weight(weight)
        if onto != "nf4" or not matrix.quantized:
            return {key: (weight.T if matrix.transposed else weight).bfloat16()}
        if packed is None or matrix.adapted is not None:
            packed = self._quantize(weight, like=packed)
        packed.quant_state.dtype = torch.bfloat16  # dtype to which other programs dequantize it
        return {key + suffix: tensor for suffix, tensor in nf4.to_tensors(packed).items()}

    def _read(self, key: str, matrix: _Matrix, *, as_trained: bool) -> tuple[Tensor, nf4.Params4bit | None]:
        """Read a weight [out, in] in fp32, and its NF4 form if the adapter was trained with that (else None)."""
        if self.prequantized and matrix.quantized:
            assert key not in self.parts, f"{key} is packed, and packed weights are not trained"
            (packed,) = self._packed.read([key])
            packed = packed.to(self.device)
        else:
            weight = self._dense(key).to(self.device)
            weight = weight if matrix.rows is None else weight[matrix.rows]
            weight = weight.T if matrix.transposed else weight
            if not (as_trained and matrix.quantized and self.base.quantization == "nf4"):
                return weight, None
            # In the dtype in which transformers hands it to bitsandbytes when it loads the base
            weight = weight.to(bases.compute_dtype(self.base, self.device))
            packed = self._quantize(matrix.initial.left_in_base(weight) if matrix.initial else weight)
        return nf4.dequantize(packed, packed.quant_state, torch.float32), packed

    def _quantize(self, weight: Tensor, like: nf4.Params4bit | None = None) -> nf4.Params4bit:
        """Quantize a weight to NF4 with the recipe's settings, or with those of `like`, the NF4 form in the files."""
        if like is not None:
            return nf4.quantize(weight, like.quant_state.blocksize, like.quant_state.nested)
        return nf4.quantize(weight, self.base.block_size, self.base.double_quant)

    def _locate(self, meta_base: bases.MetaBase) -> tuple[dict[str, _Matrix], dict[str, list[_Matrix]]]:
        """Find the matrices in the files, by their names there: a matrix alone, and several in a tensor."""
        modules = dict(meta_base.model.named_modules())
        names, values = ParameterNames(meta_base.model), InitialValues.of(meta_base.model)
        initial = values.layers if values else {}
        quantized = meta_base.quantized

        def matrix(name: str, rows: slice | None = None) -> _Matrix:
            module = modules[name]
            adapted = module if isinstance(module, AdaptedLayer) and module.changes_weight else None
            transposed = name in meta_base.transposed
            return _Matrix(name, adapted, initial.get(name), name in quantized, transposed, rows)

        matrices: dict[str, _Matrix] = {}
        stacked: dict[str, list[_Matrix]] = {}
        for key in self.reader:
            if (name := names.module(key, ".weight")) is not None:
                matrices[key] = matrix(name)
            elif not meta_base.prequantized and (several := names.modules(key)):
                ends = list(itertools.accumulate(modules[one].out_features for one in several))
                slices = map(slice, [0, *ends], ends)
                stacked[key] = [matrix(one, rows) for one, rows in zip(several, slices, strict=True)]
        located = {one.name for one in itertools.chain(matrices.values(), *stacked.values())}
        layers = AdaptedLayer.of(meta_base.model).keys() - LoRAExperts.of(meta_base.model).keys()
        wanted = quantized | layers
        if missing := sorted(wanted - located):
            raise ModelError(
                f"{self.folder}: {len(missing)} of the model's layers ({listed(missing)}) have no weight of their own "
                "in these files (tied, or stored under another name). Use base and adapter without merging"
            )
        return matrices, stacked

    def _locate_biases(self, model: nn.Module) -> dict[str, AdaptedLayer]:
        """Find the layers whose bias the adapter changes, by the names of the biases in the files."""
        wanted = {name: layer for name, layer in AdaptedLayer.of(model).items() if layer.changes_bias}
        names = ParameterNames(model)
        found = {key: names.module(key, ".bias") for key in self.reader} if wanted else {}
        biases = {key: wanted[name] for key, name in found.items() if name in wanted}
        if missing := sorted(wanted.keys() - set(found.values())):
            raise ModelError(
                f"{self.folder}: {len(missing)} of the adapted layers ({listed(missing)}) have no bias in these "
                "files, and a merged model has the base's architecture. Use base and adapter without merging"
            )
        return biases

    def _locate_parts(self, model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
        """Find the tensors that were trained beside the adapter in the files; each gives the merged tensor."""
        names = ParameterNames(model)
        trained: dict[tuple[str, str], Tensor] = {}
        merge: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
        for name, rows in TrainedRows.of(model).items():
            trained[name, ".weight"], merge[name, ".weight"] = rows.values, rows.merged_weight
        for name, module in whole_modules(model).items():
            for own, tensor in state_of(module).items():
                trained[name, f".{own}"], merge[name, f".{own}"] = tensor, partial(_replaced, tensor.detach())
        found = {
            key: (module_name, suffix)
            for suffix in {suffix for _, suffix in trained}
            for key in self.reader
            if (module_name := names.module(key, suffix)) is not None and (module_name, suffix) in trained
        }
        stored = {
            trained[place] for place in found.values()
        }  # a tied weight is stored under one of its names
        if missing := sorted(
            name + suffix for (name, suffix), tensor in trained.items() if tensor not in stored
        ):
            raise ModelError(
                f"{self.folder}: {len(missing)} of the tensors trained beside the adapter ({listed(missing)}) are not "
                "in these files (tied, or stored under another name). Use base and adapter without merging"
            )
        return {key: merge[place] for key, place in found.items()}


def _replaced(trained: Tensor, _: Tensor) -> Tensor:
    return trained


def write_merged(
    source: MergeSource,
    onto: Onto,
    folder: Path,
    prompts: Prompts,
    progress: Callable[[], object] = lambda: None,
) -> int:
    """Write the merged model into `folder`, with config, tokenizer, chat template and generation config.

    Args:
        prompts: prompts of the training data, which the files describe; see `write_prompt_files`.
        progress: called once for each of `source.keys`.

    Returns:
        The bytes of the weights.

    Raises:
        SaveError: a file cannot be written.
    """
    with save_errors(folder):
        folder.mkdir(parents=True)
        with ShardWriter(folder) as writer:
            for tensors in source.tensors(onto):
                for name, tensor in tensors.items():
                    writer.add(name, tensor)
                progress()
        # the tokenizer of the run has the tokens that were trained
        own = TOKENIZER_FILES if source.vocabulary is None else ()
        for pattern in (*own, *COMPANIONS, *(["*.py"] if source.base.trust_remote_code else [])):
            for file in source.folder.glob(pattern):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, folder / file.name)
        if source.vocabulary is not None:
            prompts.tokenizer.save_pretrained(folder)
        write_object(folder / "config.json", _config(source, onto))
        write_prompt_files(folder, prompts)
    return writer.total_bytes


def _config(source: MergeSource, onto: Onto) -> dict[str, Any]:
    """Return the base's config.json with the dtype and quantization of the merged files."""
    config = read_object(source.folder / "config.json")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)  # the older name of dtype
    config["dtype"] = "bfloat16"
    if source.vocabulary is not None:
        text = config if "vocab_size" in config else config.get("text_config", {})
        text["vocab_size"] = source.vocabulary
    if onto == "nf4":
        quantization = nf4_config(source.base, torch.bfloat16).to_dict()
        # Without the list, transformers expects 4-bit weights where the files have dense ones
        quantization["llm_int8_skip_modules"] = None if source.excluded is None else list(source.excluded)
        config["quantization_config"] = quantization
    return config


def _replaced_in_4_bits(model: nn.Module) -> str | None:
    """Return a class in `model` that transformers replaces when it reads a 4-bit model; None if there is none.

    The replacement has other tensors, such as one layer for each expert of Llama 4, so files of the original class
    cannot be read back.
    """
    # ours keep the module whose place they took
    kinds = {type(getattr(module, "original", module)).__name__ for module in model.modules()}
    found = [
        name
        for name, patch in MODULES_TO_PATCH_FOR_QUANTIZATION.items()
        if name in kinds and QuantizationMethod.BITS_AND_BYTES in patch["quantization_methods"]
    ]
    return found[0] if found else None
