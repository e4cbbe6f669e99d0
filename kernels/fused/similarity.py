"""The nearest of some tokens to every token, from tiles of their products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.similarity import EPS, measure, unit
from prune.kernels.similarity import cosine_reduce as reference

from .blocks import check, gemm_blocks


@triton.jit
def products(
    x, x_r, rows, count, y, y_r, columns, length, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products `[ROWS, COLUMNS]` fp32 of rows of `x` `[count, width]` and of `y` `[length, width]`; 0 outside."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    inner = tl.arange(0, INNER)
    for start in range(0, width, INNER):
        left = (rows < count)[:, None] & (inner < width - start)[None, :]
        right = (columns < length)[None, :] & (inner < width - start)[:, None]
        a = tl.load(x + rows[:, None].to(tl.int64) * x_r + start + inner[None, :], left, other=0.0)
        b = tl.load(y + columns[None, :].to(tl.int64) * y_r + start + inner[:, None], right, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _nearest_kernel(
    x, x_s, x_r, y, y_s, y_r, scale, mask, out, count, length, width, OTHERS: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: the nearest columns of a block of rows of one sample; ties to the lowest."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.program_id(1).to(tl.int64)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    nearest = tl.full([ROWS], -1, tl.int32)
    for start in range(0, length, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < length
        found = products(
            x + s * x_s, x_r, rows, count, y + s * y_s, y_r, columns, length, width, ROWS, COLUMNS, INNER, WIDEN
        )
        found *= tl.load(scale + s * length + columns, inside, other=0.0)[None, :]
        counts = inside[None, :] & (rows < count)[:, None] & (found == found)  # padding among the rows may hold NaN
        if MASKED:
            counts = counts & (tl.load(mask + s * length + columns, inside, other=0) != 0)[None, :]
        if OTHERS:
            counts = counts & (columns[None, :] != rows[:, None])
        found = tl.where(counts, found, float("-inf"))
        top, at = tl.max(found, 1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.where(top > best, start + at, nearest)
        best = tl.maximum(best, top)
    tl.store(out + s * count + rows, nearest, rows < count)


def cosine_reduce(
    x: Tensor,
    y: Tensor | None = None,
    reduce: str = "max",
    mask: Tensor | None = None,
    chunk: int = 1024,
    eps: float = EPS,
) -> Tensor:
    if reduce != "max":  # a sum needs no product of all pairs
        return reference.reference(x, y, reduce, mask, chunk, eps)
    other = x if y is None else y
    check(x, other)
    x, other = (one if one.stride(-1) == 1 else one.contiguous() for one in (x, other))
    samples, count, width = x.shape
    length = other.shape[1]
    scale = 1 / torch.linalg.vector_norm(other, dim=-1, dtype=torch.float32).clamp(min=eps)
    out = torch.empty(samples, count, dtype=torch.int32, device=x.device)
    found = gemm_blocks(x, count, width)
    _nearest_kernel[triton.cdiv(count, found.rows), samples](
        *(x, *x.stride()[:2], other, *other.stride()[:2], scale),
        *(x if mask is None else mask.contiguous().view(torch.uint8), out, count, length, width),
        OTHERS=y is None,
        MASKED=mask is not None,
        **found.launch(),
    )
    rows = unit(x, eps)
    return measure(rows, rows if y is None else unit(y, eps), out.long(), chunk)
