"""The nearest tokens of every token, sorted tile by tile where their products are made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.dispatch import NotServed
from prune.kernels.similarity import EPS

from .blocks import check, gemm_blocks
from .similarity import products


@triton.jit
def packed(value, column):
    """A number that sorts as `value`, and of equal ones the lowest column last: both in one int64."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0: equal to minus zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _topk_kernel(
    x, x_s, x_r, y, y_s, y_r, x_scale, y_scale, x_group, y_group, own, index, cosine, count, length, width, k,
    TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows of one sample, and the best of every tile of columns merged with those so far."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.program_id(1).to(tl.int64)
    real = rows < count
    mine = tl.load(x_group + s * count + rows, real, other=-1)
    self = tl.load(own + s * count + rows, real, other=-1)
    unit = tl.load(x_scale + s * count + rows, real, other=0.0)
    nothing = packed(tl.full([ROWS, TOP], float("-inf"), tl.float32), tl.zeros([ROWS, TOP], tl.int32))
    best = nothing
    for start in range(0, length, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < length
        found = products(
            x + s * x_s, x_r, rows, count, y + s * y_s, y_r, columns, length, width, ROWS, COLUMNS, INNER, WIDEN
        )
        found *= unit[:, None] * tl.load(y_scale + s * length + columns, inside, other=0.0)[None, :]
        theirs = tl.load(y_group + s * length + columns, inside, other=-1)
        seen = (mine[:, None] == theirs[None, :]) & (theirs >= 0)[None, :] & (columns[None, :] != self[:, None])
        found = tl.where(seen & (found == found), found, float("-inf"))
        tile = tl.topk(packed(found, columns[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)), TOP)
        # Of two falling sequences, one of them turned round, the larger ones place by place are the largest of both.
        best = tl.bitonic_merge(tl.maximum(best, tl.flip(tile, 1)), descending=True)
    ordered = (best >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    column = tl.where(value == float("-inf"), 0, 0x7FFFFFFF - (best & 0x7FFFFFFF))
    at = tl.arange(0, TOP)
    out = (s * count + rows[:, None]) * k + at[None, :]
    written = real[:, None] & (at < k)[None, :]
    tl.store(index + out, column, written)
    tl.store(cosine + out, value, written)


@torch.no_grad()
def cosine_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    x_group: Tensor,
    y_group: Tensor,
    own: Tensor | None = None,
    chunk: int | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    check(x, y)
    x, y = (one if one.stride(-1) == 1 else one.contiguous() for one in (x, y))
    (samples, count, width), length, k = x.shape, y.shape[1], min(k, y.shape[1])
    sizes, top = gemm_blocks(x, count, width), triton.next_power_of_2(max(2, k))
    if not 0 < k <= top <= min(64, sizes.columns):
        raise NotServed(f"k={k}: 1 to {min(64, sizes.columns)} are served")
    scales = [1 / torch.linalg.vector_norm(one, dim=-1, dtype=torch.float32).clamp(min=eps) for one in (x, y)]
    own = torch.full(x.shape[:2], -1, device=x.device) if own is None else own
    index = torch.empty(samples, count, k, dtype=torch.int64, device=x.device)
    cosine = torch.empty(samples, count, k, device=x.device)
    _topk_kernel[triton.cdiv(count, sizes.rows), samples](
        *(x, *x.stride()[:2], y, *y.stride()[:2], *scales),
        *(group.contiguous() for group in (x_group, y_group, own)),
        *(index, cosine, count, length, width, k),
        TOP=top,
        **sizes.launch(),
    )
    return index, cosine
