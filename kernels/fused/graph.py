"""Propagation over the graph of similar tokens, its edges from tiles of products."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.graph import ELEMENTS

from .blocks import check, gemm_blocks
from .similarity import products


@triton.jit
def _edges(
    x, x_r, scale, group, mask, rows, columns, count, width, threshold, sharpness,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of the transition matrix, to the base 2; -inf where there is no edge."""
    cosine = products(x, x_r, rows, count, x, x_r, columns, count, width, ROWS, COLUMNS, INNER, WIDEN)
    cosine *= tl.load(scale + rows, rows < count, other=0.0)[:, None]
    cosine *= tl.load(scale + columns, columns < count, other=0.0)[None, :]
    here = tl.load(mask + rows, rows < count, other=0)
    there = tl.load(mask + columns, columns < count, other=0)
    mine = tl.load(group + rows, rows < count, other=0)
    theirs = tl.load(group + columns, columns < count, other=0)
    near = (cosine >= threshold) & (mine[:, None] == theirs[None, :])
    edge = (near | (rows[:, None] == columns[None, :])) & (here != 0)[:, None] & (there != 0)[None, :]
    return tl.where(edge, cosine * sharpness, float("-inf"))


@triton.jit
def _rows_kernel(
    x, x_s, x_r, scale, group, mask, count, width, threshold, sharpness, lse, logits, STORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: log-sum-exp of a block of rows of one sample; with STORE their logits too."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.program_id(1).to(tl.int64)
    x, scale, group, mask = x + s * x_s, scale + s * count, group + s * count, mask + s * count
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        found = _edges(
            x, x_r, scale, group, mask, rows, columns, count, width, threshold, sharpness, ROWS, COLUMNS, INNER, WIDEN
        )
        if STORE:
            inside = (rows < count)[:, None] & (columns < count)[None, :]
            tl.store(logits + (s * count + rows[:, None]) * count + columns[None, :], found, inside)
        higher = tl.maximum(largest, tl.max(found, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(found - shift[:, None]), 1)
        largest = higher
    found = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse + s * count + rows, found, rows < count)


@triton.jit
def _flow_kernel(
    x, x_s, x_r, scale, group, mask, count, width, threshold, sharpness, lse, logits, held, flowed, degree,
    STORED: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: what a block of columns of one sample gets from all rows; with COUNT the rows count their edges."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    s = tl.program_id(1).to(tl.int64)
    x, scale, group, mask = x + s * x_s, scale + s * count, group + s * count, mask + s * count
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        real = rows < count
        if STORED:
            inside = real[:, None] & (columns < count)[None, :]
            at = logits + (s * count + rows[:, None]) * count + columns[None, :]
            found = tl.load(at, inside, other=float("-inf"))
        else:
            found = _edges(
                x, x_r, scale, group, mask, rows, columns, count, width, threshold, sharpness,
                ROWS, COLUMNS, INNER, WIDEN,
            )  # fmt: skip
        weights = tl.exp2(found - tl.load(lse + s * count + rows, real, other=float("inf"))[:, None])
        total += tl.sum(weights * tl.load(held + s * count + rows, real, other=0.0)[:, None], 0)
        if COUNT:
            tl.atomic_add(degree + s * count + rows, tl.sum((weights > 0).to(tl.int32), 1), real)
    tl.store(flowed + s * count + columns, total, columns < count)


@torch.no_grad()
def propagate(
    x: Tensor,
    start: Tensor,
    group: Tensor,
    mask: Tensor,
    threshold: float,
    temperature: float,
    iterations: int,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    check(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    samples, count, width = x.shape
    stored = samples * count**2 <= ELEMENTS
    scale = (1 / torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12)).masked_fill(~mask, 0)
    held = start.float().masked_fill(~mask, 0).contiguous()
    lse, degree = torch.empty_like(held), torch.zeros(samples, count, dtype=torch.int32, device=x.device)
    logits = x.new_empty((samples, count, count) if stored else 1, dtype=torch.float32)
    blocks = gemm_blocks(x, count, width)
    given = [x, *x.stride()[:2], scale, group.contiguous(), mask.contiguous().view(torch.uint8), count, width]
    given += [threshold, math.log2(math.e) / temperature, lse, logits]
    _rows_kernel[triton.cdiv(count, blocks.rows), samples](*given, STORE=stored, **blocks.launch())
    for step in range(iterations):
        flowed = torch.empty_like(held)
        grid = triton.cdiv(count, blocks.columns), samples
        rest = dict(STORED=stored, COUNT=step == 0) | blocks.launch()
        _flow_kernel[grid](*given, held, flowed, degree, **rest)
        held = flowed
    return held, degree.long()
