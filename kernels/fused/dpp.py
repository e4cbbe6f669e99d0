"""Greedy MAP of a DPP in one launch; see `fused.greedy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.dpp import SPENT
from prune.kernels.greedy import every, picks_of
from prune.kernels.quota import quotas
from prune.kernels.topk import host_counts

from .greedy import Lines, best_of, line_of, slots

TINY = torch.finfo(torch.float32).tiny
TOGETHER = 1 << 14
"""Numbers of the decomposition read at a time; more do not fit into the registers of one program."""


@torch.no_grad()
def dpp_map(
    x: Tensor, quality: Tensor, k: int | Sequence[int], mask: Tensor | None = None, tile: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows, n, _ = x.shape
    counts, mask = host_counts(k, rows), every(x) if mask is None else mask
    lines = Lines.of(x)
    left = mask.long() if tile is None else quotas(tile, counts, mask)
    quality = quality.float().masked_fill(~mask, 0).contiguous()
    own = quality.square().masked_fill(lines[0].diagonal(dim1=1, dim2=2) == 0, 0)
    order, limit = slots(counts, mask)
    factors = torch.empty(rows, min(order.shape[1], n), n, device=x.device)
    _map[(rows,)](
        *lines,
        quality,
        own.contiguous(),
        mask.contiguous(),
        left.contiguous(),
        left if tile is None else tile.contiguous(),
        factors,
        limit,
        order,
        n,
        factors.shape[1],
        order.shape[1],
        TILED=tile is not None,
        SPENT=SPENT,
        TINY=TINY,
        LINES=min(8, max(1, TOGETHER // lines.launch["BLOCK"])),
        **lines.launch,
    )
    return picks_of(order, counts, mask)


@triton.jit
def _map(
    products,
    scale,
    quality,
    own,
    mask,
    share,
    tile,
    factors,
    limit,
    order,
    n,
    lines,
    width,
    TILED: tl.constexpr,
    SPENT: tl.constexpr,
    TINY: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    base = image * n
    factors += base * lines
    good = tl.load(quality + base + at, mask=at < n, other=0.0)
    whole = tl.load(own + base + at, mask=at < n, other=0.0)
    real = tl.load(mask + base + at, mask=at < n, other=0).to(tl.int1)
    left = tl.load(share + base + at, mask=at < n, other=0).to(tl.int32)
    rest, offered = whole, real
    for step in range(tl.load(limit + image)):
        pick = best_of(rest, offered & (left > 0)) if TILED else best_of(rest, offered)
        tl.store(order + image * width + step, pick)
        offered = offered & (at != pick)
        weight = tl.sum(tl.where(at == pick, rest, 0.0), 0)
        column = good * tl.load(quality + base + pick) * line_of(products, scale, image, pick, at, n)
        if TILED:
            same = tl.load(tile + base + at, mask=at < n, other=0) == tl.load(tile + base + pick)
            column = tl.where(same, column, 0.0)
            left = tl.where(same, left - 1, left)
        known = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, step, LINES):
            line = begin + tl.arange(0, LINES)
            done = tl.load(
                factors + line[:, None] * n + at[None, :], mask=(line < step)[:, None] & (at < n)[None, :], other=0.0
            )
            picked = tl.load(factors + line * n + pick, mask=line < step, other=0.0)
            known += tl.sum(done * picked[:, None], 0)
        column = tl.div_rn(column - known, tl.sqrt_rn(tl.maximum(weight, TINY)))
        column = tl.where(weight > 0, tl.where(real, column, 0.0), 0.0)
        tl.store(factors + step * n + at, column, mask=at < n)
        tl.debug_barrier()  # every thread reads in the next step what others have written in this one
        rest -= column * column
        rest = tl.where(rest <= SPENT * whole, 0.0, rest)
