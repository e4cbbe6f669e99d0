"""Best matches by cosine, a tile of products at a time; the matrix of all cosines is never made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.similarity import EPS, unit

from .blocks import check, gemm_blocks
from .similarity import products


@torch.no_grad()
def best_match(x: Tensor, y: Tensor, mask: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    check(x, y)
    (rows, n, dim), m = x.shape, y.shape[1]
    (x, x_scale), (y, y_scale) = _scaled(x), _scaled(y)
    index = torch.empty(rows, n, dtype=torch.int64, device=x.device)
    cosine = torch.empty(rows, n, device=x.device)
    sizes = gemm_blocks(x, n, dim)
    _match[(triton.cdiv(n, sizes.rows), rows)](
        x, y, x_scale, y_scale, mask.contiguous(), index, cosine, n, m, dim, **sizes.launch()
    )
    return index, cosine


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to multiply, and factors of the products: fp32 is scaled to length 1 first, as the reference does."""
    if x.dtype == torch.float32:
        return unit(x).contiguous(), x.new_ones(x.shape[:2])
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return x.contiguous(), norm.clamp_(min=EPS).reciprocal_()


@triton.jit
def _match(
    x,
    y,
    x_scale,
    y_scale,
    mask,
    index,
    cosine,
    n,
    m,
    dim,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x += image * n * dim
    y += image * m * dim
    mine = tl.load(x_scale + image * n + rows, mask=rows < n, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    for first in range(0, m, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        total = products(x, dim, rows, n, y, dim, columns, m, dim, ROWS, COLUMNS, INNER, WIDEN)
        theirs = tl.load(y_scale + image * m + columns, mask=columns < m, other=0.0)
        real = tl.load(mask + image * m + columns, mask=columns < m, other=0).to(tl.int1)
        found = tl.where(real[None, :], total * (mine[:, None] * theirs[None, :]), float("-inf"))
        top, place = tl.max(found, 1, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(top > best, first + place, where)
        best = tl.maximum(top, best)
    tl.store(index + image * n + rows, where.to(tl.int64), mask=rows < n)
    tl.store(cosine + image * n + rows, best, mask=rows < n)
