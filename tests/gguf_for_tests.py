"""Computes the logits of a GGUF file in plain torch, as llama.cpp does: from the file's tensors and settings alone."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from torch.nn import functional as F

INTERLEAVED = {"llama"}  # neighbouring values of a head are rotated together; elsewhere its two halves
GEMMA = {"gemma", "gemma2", "gemma3"}
WINDOW_EVERY = {"gemma2": 2, "gemma3": 6}
FREQUENCY_IN_WINDOWS = {"gemma3": 10000.0}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in float32, with numpy's order of dimensions."""
    return {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(file).tensors
    }


def with_adapter(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Add an adapter as llama.cpp does: the file's alpha over the rank of the tensor."""
    alpha, own = fields(file)["adapter.lora.alpha"], tensors(file)
    changed = dict(weights)
    for name in own:
        if name.endswith(".lora_a"):
            target = name.removesuffix(".lora_a")
            a, b = own[name], own[f"{target}.lora_b"]
            update = (b @ a.T).T if target == "token_embd.weight" else b @ a
            changed[target] = weights[target] + alpha / b.shape[1] * update
    return changed


def logits(file: Path, ids: list[int], adapter: Path | None = None) -> Tensor:
    """Return the logits [n, V] of a text."""
    said = fields(file)
    arch = said["general.architecture"]
    own = {
        name.removeprefix(f"{arch}."): value for name, value in said.items() if name.startswith(f"{arch}.")
    }
    weights = tensors(file)
    if adapter is not None:
        assert fields(adapter)["general.architecture"] == arch
        weights = with_adapter(weights, adapter)
    x = weights["token_embd.weight"][ids]
    if arch in GEMMA:
        x = x * own["embedding_length"] ** 0.5
    for number in range(own["block_count"]):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blk.{number}.")}
        mixed = _attention(_norm(x, block["attn_norm.weight"], own), block, own, arch, number, weights)
        x = x + _norm(mixed, block.get("post_attention_norm.weight"), own)
        h = _norm(x, block["ffn_norm.weight"], own)
        gate = h @ block["ffn_gate.weight"].T
        gate = F.gelu(gate, approximate="tanh") if arch in GEMMA else F.silu(gate)
        h = (gate * (h @ block["ffn_up.weight"].T)) @ block["ffn_down.weight"].T
        x = x + _norm(h, block.get("post_ffw_norm.weight"), own)
    x = _norm(x, weights["output_norm.weight"], own)
    out = x @ weights.get("output.weight", weights["token_embd.weight"]).T
    return _capped(out, own.get("final_logit_softcapping"))


def _norm(x: Tensor, weight: Tensor | None, own: dict[str, Any]) -> Tensor:
    if weight is None:
        return x
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + own["attention.layer_norm_rms_epsilon"]).rsqrt()


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def _attention(
    x: Tensor,
    block: dict[str, Tensor],
    own: dict[str, Any],
    arch: str,
    number: int,
    weights: dict[str, Tensor],
) -> Tensor:
    size, every = own["attention.key_length"], WINDOW_EVERY.get(arch)
    windowed = every is not None and number % every < every - 1
    q, k, v = (
        (x @ block[f"attn_{name}.weight"].T + block.get(f"attn_{name}.bias", torch.zeros(1)))
        .unflatten(-1, (-1, size))
        .transpose(0, 1)
        for name in "qkv"
    )
    q, k = (_norm(t, block.get(f"attn_{name}_norm.weight"), own) for t, name in ((q, "q"), (k, "k")))
    base, scale = own["rope.freq_base"], 1.0
    if windowed and arch in FREQUENCY_IN_WINDOWS:
        base = FREQUENCY_IN_WINDOWS[arch]
    elif own.get("rope.scaling.type") == "linear":
        scale = own["rope.scaling.factor"]
    frequencies = base ** -(torch.arange(0, size, 2) / size) / weights.get("rope_freqs.weight", 1.0) / scale
    angles = torch.arange(len(x))[:, None] * frequencies
    q, k = (_rotated(t, angles, arch in INTERLEAVED) for t in (q, k))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = _capped(q @ k.transpose(1, 2) * size**-0.5, own.get("attn_logit_softcapping"))
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    hidden = (distance < 0) | (windowed and distance >= own.get("attention.sliding_window", 0))
    mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    out = mixed.transpose(0, 1).flatten(1) @ block["attn_output.weight"].T
    return out + block.get("attn_output.bias", torch.zeros(1))


def _rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
