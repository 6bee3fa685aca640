"""Triton kernels and their launchers. The kernels compute in fp32.

Tensors must be contiguous unless a kernel gets their strides. Offsets have 64 bits, because the logits of a long batch
can have more elements than 32 bits can count. Triton's interpreter runs all kernels without a GPU
(`tests/test_kernels.py`).
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""elements per program of an elementwise kernel"""
VOCABULARY_BLOCK = 4096
TILE_ROWS = 64
"""rows of a tile in products by group"""


def silu_product(gate: Tensor, up: Tensor, product: Tensor) -> None:
    """Write silu(gate) * up into `product` with one kernel; see `gate.silu_product`."""
    with _on(gate):
        _silu_product[_blocks(gate)](gate, up, product, gate.numel(), BLOCK=ELEMENTS)


def silu_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    """Overwrite `grad` with the gradient of gate, and `d_up` with that of up; see `gate.silu_gradients`."""
    with _on(gate):
        _silu_gradients[_blocks(gate)](gate, up, grad, d_up, gate.numel(), BLOCK=ELEMENTS)


def normalize(
    x: Tensor, weight: Tensor, eps: float, y: Tensor, offset: float = 0.0, rounds_late: bool = False
) -> None:
    """Launch the kernel of `norm.normalize`."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    layout = _rows_of(width)
    with _on(x):
        _normalize[(triton.cdiv(rows, layout["ROWS"]),)](
            x, weight, y, rows, width, eps, offset, LATE=rounds_late, **layout
        )


def normalize_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, offset: float = 0.0
) -> None:
    """Launch the kernel of `norm.normalize_gradient`."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    layout = _rows_of(width)
    with _on(x):
        _normalize_gradient[(triton.cdiv(rows, layout["ROWS"]),)](
            grad, x, weight, grad if residual is None else residual, rows, width, eps, offset,
            RESIDUAL=residual is not None, **layout,
        )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, y: Tensor, in_pairs: bool) -> None:
    """Launch the kernel of `rotary.rotate`."""
    batch, length, heads, width = x.shape
    rotated = cos.shape[-1]
    rest = triton.next_power_of_2(width - rotated) if rotated < width else 0
    with _on(x):
        _rotate[(batch * length,)](
            x, cos, sin, y, length, heads, rotated // 2, width, *x.stride(), float(direction),
            OWN_ANGLES=len(cos) > 1, IN_PAIRS=in_pairs, HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(rotated // 2), REST=rest, num_warps=4,
        )  # fmt: skip


def loss(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None,
    logit_scale: float,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    """Launch the kernel of `cross_entropy.loss_and_gradient`."""
    with _on(logits):
        _loss[(len(logits),)](
            logits, targets, logits if gradient is None else gradient, losses, logit_scale,
            1.0 if softcap is None else softcap,
            WIDTH=logits.shape[1], CAPPED=softcap is not None, WANTED=gradient is not None,
            BLOCK=VOCABULARY_BLOCK, num_warps=8,
        )  # fmt: skip


def dequantize(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    table: Tensor,
    offset: Tensor,
    code: Tensor,
    block_size: int,
    statistics_block_size: int,
) -> None:
    """Launch the kernel of `quantization.nf4.dequantize`.

    Args:
        out: output [out, in], or several matrices [G, out, in] that each have whole blocks.
        packed: 4-bit codes, two per byte.
        absmax: 8-bit absmax of each block, as codes of `table`.
        scales, table, offset: scale of each block of absmax, values of their codes, and the mean of each matrix.
        code: the 16 NF4 values.
        block_size: values per absmax.
        statistics_block_size: absmax per scale.
    """
    with _on(out):
        _dequantize[(triton.cdiv(packed.numel(), ELEMENTS),)](
            out, packed, absmax, scales, table, offset, code, out.numel(),
            absmax.numel() // offset.numel(), scales.numel() // offset.numel(),
            BLOCK_SIZE=block_size, STATISTICS=statistics_block_size, BYTES=ELEMENTS,
            enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
        )  # fmt: skip


def grouped_product(rows: Tensor, matrices: Tensor, spans: Any, out: Tensor, add: bool, alpha: float) -> None:
    """Launch the kernel of `grouped.grouped_product`."""
    groups, inner, columns = matrices.shape
    layout = {"BM": TILE_ROWS, "BN": _side(columns, 128), "BK": _side(inner, 64)}
    tiles = sum(triton.cdiv(here.stop - here.start, TILE_ROWS) for _, here in spans.rows())
    with _on(rows):
        _grouped_product[(tiles, triton.cdiv(columns, layout["BN"]))](
            rows, matrices, out, spans.on_device, groups, inner, columns, *matrices.stride(), float(alpha),
            ADD=add, **layout, num_warps=4,
        )  # fmt: skip


def grouped_outer(x: Tensor, y: Tensor, spans: Any, out: Tensor, alpha: float) -> None:
    """Launch the kernel of `grouped.grouped_outer`."""
    groups, height, width = out.shape
    layout = {"BI": _side(height, 64), "BJ": _side(width, 128), "BM": TILE_ROWS}
    with _on(x):
        _grouped_outer[(groups, triton.cdiv(height, layout["BI"]), triton.cdiv(width, layout["BJ"]))](
            x, y, out, spans.on_device, height, width, float(alpha), **layout, num_warps=4
        )


def _side(size: int, largest: int) -> int:
    """Return the side of a tile for this size; a product of tiles needs at least 16."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _on(tensor: Tensor) -> Any:
    """Select the tensor's device: Triton launches on the current device, which can be another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _blocks(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), ELEMENTS),)


def _rows_of(width: int) -> dict[str, int]:
    """Choose launch parameters for rows of this width: a program takes whole rows, several if they are short."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@triton.jit
def _silu_product(gate, up, product, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _silu_gradients(gate, up, grad, d_up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + at, d * g * s, mask=inside)
    tl.store(grad + at, d * u * s * (1 + g * (1 - s)), mask=inside)


@triton.jit
def _normalize(
    x, weight, y, rows, width, eps, offset, LATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    scale = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / width + eps)
    unit = v * scale
    if not LATE:  # Llama rounds before the weight
        unit = unit.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, unit * w, mask=inside)


@triton.jit
def _normalize_gradient(
    grad, x, weight, residual, rows, width, eps, offset,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * w
    scale = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / width + eps)
    unit = v * scale
    mean = tl.sum(d * unit, axis=1, keep_dims=True) / width
    d = (d - unit * mean) * scale
    if RESIDUAL:
        d += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + at, d, mask=inside)


@triton.jit
def _rotate(
    x, cos, sin, y, length, heads, half, width, by_row, by_token, by_head, by_feature, direction,
    OWN_ANGLES: tl.constexpr, IN_PAIRS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # number among the tokens of all rows
    row, position = token // length, token % length
    head, pair = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    if IN_PAIRS:
        feature, other = 2 * pair, 2 * pair + 1
    else:
        feature, other = pair, pair + half
    angle = (token if OWN_ANGLES else position) * 2 * half + feature
    c = tl.load(cos + angle, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair < half, other=0.0).to(tl.float32) * direction
    x += row * by_row + position * by_token + head * by_head
    y += (token * heads + head) * width
    a = tl.load(x + feature * by_feature, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + other * by_feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + feature, a * c - b * s, mask=inside)
    tl.store(y + other, b * c + a * s, mask=inside)
    if REST > 0:  # features that are not rotated
        rest = 2 * half + tl.arange(0, REST)[None, :]
        kept = (head < heads) & (rest < width)
        tl.store(y + rest, tl.load(x + rest * by_feature, mask=kept, other=0.0), mask=kept)


@triton.jit
def _capped(products, scale, cap, CAPPED: tl.constexpr):
    """Scale and cap the raw products of the head."""
    logits = products * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # cap * tanh(logits / cap)
    return logits


@triton.jit
def _loss(
    logits, targets, gradient, losses, scale, cap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * WIDTH
    gradient += row * WIDTH
    target_logit = _capped(tl.load(logits + target).to(tl.float32), scale, cap, CAPPED)
    highest = -float("inf")
    total = 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        values = _capped(raw, scale, cap, CAPPED)
        values = tl.where(column < WIDTH, values, -float("inf"))
        higher = tl.maximum(highest, tl.max(values))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher))
        highest = higher
    tl.store(losses + row, highest + tl.log(total) - target_logit)
    if WANTED:
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            raw = tl.load(logits + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            values = _capped(raw, scale, cap, CAPPED)
            slope = tl.exp(values - highest) / total - tl.where(column == target, 1.0, 0.0)
            if CAPPED:
                slope *= 1 - (values / cap) * (values / cap)
            tl.store(gradient + column, slope * scale, mask=column < WIDTH)


@triton.jit
def _dequantize(
    out, packed, absmax, scales, table, offset, code, count, blocks, inner_blocks,
    BLOCK_SIZE: tl.constexpr, STATISTICS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BYTES
    at = start + tl.arange(0, BYTES)
    inside = at * 2 < count
    codes = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // (BLOCK_SIZE // 2)
    matrix = block // blocks
    level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    statistic = matrix * inner_blocks + block % blocks // STATISTICS
    inner = tl.load(scales + statistic, mask=inside, other=0.0)
    mean = tl.load(offset + matrix, mask=inside, other=0.0)
    scale = tl.load(table + level) * inner + mean
    values = tl.interleave(tl.load(code + (codes >> 4)) * scale, tl.load(code + (codes & 15)) * scale)
    to = start * 2 + tl.arange(0, 2 * BYTES)
    tl.store(out + to, values, mask=to < count)


@triton.jit
def _grouped_product(
    rows, matrices, out, ends, groups, inner, columns, by_group, by_inner, by_column, alpha,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group, first, stop, begin, passed = 0, 0, 0, 0, 0
    for g in range(groups):  # find the rows of this tile: no tile has rows of two groups
        end = tl.load(ends + g).to(tl.int32)
        tiles = tl.cdiv(end - begin, BM)
        here = (tile >= passed) & (tile < passed + tiles)
        group = tl.where(here, g, group)
        first = tl.where(here, begin + (tile - passed) * BM, first)
        stop = tl.where(here, end, stop)
        passed += tiles
        begin = end
    row = (first + tl.arange(0, BM))[:, None].to(tl.int64)
    column = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    matrices += tl.cast(group, tl.int64) * by_group
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, inner, BK):
        along, down = (start + tl.arange(0, BK))[None, :], (start + tl.arange(0, BK))[:, None]
        a = tl.load(rows + row * inner + along, mask=(row < stop) & (along < inner), other=0.0)
        at = down.to(tl.int64) * by_inner + column.to(tl.int64) * by_column
        b = tl.load(matrices + at, mask=(down < inner) & (column < columns), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    total *= alpha
    to, inside = out + row * columns + column, (row < stop) & (column < columns)
    if ADD:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total, mask=inside)


@triton.jit
def _grouped_outer(
    x, y, out, ends, height, width, alpha, BI: tl.constexpr, BJ: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    stop = tl.load(ends + group).to(tl.int32)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int32)
    i, j = tl.program_id(1) * BI + tl.arange(0, BI), tl.program_id(2) * BJ + tl.arange(0, BJ)
    total = tl.zeros((BI, BJ), dtype=tl.float32)
    for start in range(begin, stop, BM):
        row = (start + tl.arange(0, BM)).to(tl.int64)
        a = tl.load(
            x + row[None, :] * height + i[:, None],
            mask=(row[None, :] < stop) & (i[:, None] < height),
            other=0.0,
        )
        b = tl.load(
            y + row[:, None] * width + j[None, :],
            mask=(row[:, None] < stop) & (j[None, :] < width),
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    to = out + (group * height + i[:, None]) * width + j[None, :]
    inside = (i[:, None] < height) & (j[None, :] < width)
    tl.store(to, tl.load(to, mask=inside, other=0.0).to(tl.float32) + total * alpha, mask=inside)
