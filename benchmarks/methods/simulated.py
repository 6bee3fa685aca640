"""Simulated 4-bit weights: FP4 and int4 rounded in software and stored as floats, to compare NF4 with.

A block of consecutive values is divided by its largest magnitude, each value is rounded to the nearest code, and the
product is stored. So the numbers are those of a 4-bit base, but memory and speed are not; a machine that computes in
bf16 rounds them once more. The package itself has NF4 only; these bases exist for the comparison of QLoRA's section 4
(Dettmers et al. 2023, table 2 and figure 3).
"""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CODES = {
    "fp4": sorted({sign * value / 6 for value in _E2M1 for sign in (-1, 1)}),
    "int4": [level / 7 for level in range(-7, 8)],
}
"""values of each code, from -1 to 1: E2M1 floats (15 values, as zero has two codes) and symmetric integers"""

LINEAR = re.compile(r".*\.layers\..*_proj\.weight")
"""weights that are quantized: those that the package stores in NF4"""


def rounded(weight: Tensor, code: list[float], block_size: int) -> Tensor:
    """Round `weight` [out, in] to the code, in blocks of `block_size` consecutive values with an fp32 absmax each.

    Returns:
        The rounded weight [out, in] in fp32. A value midway between two codes gets the upper one.
    """
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(code)
    limits = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny), limits, right=True)
    return (values[codes] * absmax).flatten()[: len(flat)].view(weight.shape)


def write(base: Path, name: str, to: Path) -> None:
    """Write a copy of the base in folder `base` whose linear weights are rounded as `name` says, such as fp4-64."""
    kind, block_size = name.split("-")
    tensors = load_file(base / "model.safetensors")
    for tensor, weight in tensors.items():
        if LINEAR.fullmatch(tensor):
            tensors[tensor] = rounded(weight, CODES[kind], int(block_size))
        else:
            tensors[tensor] = weight.float()
    draft = to.with_name(f".{to.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(base, draft)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    draft.rename(to)
