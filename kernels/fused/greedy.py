"""Greedy selection in one launch: the loop over picks runs inside the kernel, one program per image.

A first launch makes all cosines of an image. A step then reads one line of them, N numbers, where reading the features
would be N x D through a single processor. The products of one pair are summed in one order wherever it stands, so that
equal tokens tie to the bit, as in the references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.dispatch import NotServed
from prune.kernels.greedy import SAME, every, picks_of
from prune.kernels.similarity import EPS, unit
from prune.kernels.topk import host_counts, to_device

from .blocks import check, gemm_blocks, interpreted
from .similarity import products

HELD = 1 << 28
"""Cosines held at a time, at most: 1 GiB of fp32, which is 32 images of 2880 tokens or one of 16384."""

TOGETHER = 1 << 14
"""Cosines one program compares while the first pick is sought."""


@torch.no_grad()
def farthest_point(
    x: Tensor, k: int | Sequence[int], mask: Tensor | None = None, chunk: int = 1024, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    counts, mask = host_counts(k, len(x)), every(x) if mask is None else mask
    lines, start = Lines.of(x, eps), torch.empty(x.shape[:2], device=x.device)
    rows = max(1, TOGETHER // lines.launch["BLOCK"])
    _far_from_all[(triton.cdiv(x.shape[1], rows), len(x))](
        *lines, mask.contiguous(), start, x.shape[1], ROWS=rows, SAME=SAME, **lines.launch
    )
    return _grow(lines, start, counts, mask, "nearest")


@torch.no_grad()
def spread(
    x: Tensor, first: Tensor, k: int | Sequence[int], mask: Tensor, rule: str = "nearest"
) -> tuple[Tensor, Tensor]:
    if rule not in ("nearest", "sum"):
        raise ValueError(f"rule={rule!r} must be 'nearest' or 'sum'")
    start = torch.zeros(x.shape[:2], device=x.device).scatter_(1, first, 1.0)
    return _grow(Lines.of(x), start, host_counts(k, len(x)), mask, rule)


@torch.no_grad()
def greedy_veto(x: Tensor, weight: Tensor, k: int | Sequence[int], mask: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    counts, lines = host_counts(k, len(x)), Lines.of(x)
    weight = weight.float().clamp(min=torch.finfo(torch.float32).min).contiguous()
    order, limit = slots(counts, mask)
    _veto[(len(x),)](*lines, weight, mask.contiguous(), limit, order, x.shape[1], order.shape[1], tau, **lines.launch)
    return picks_of(order, counts, mask)


def _grow(lines: Lines, start: Tensor, counts: list[int], mask: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    order, limit = slots(counts, mask)
    n = mask.shape[1]
    _spread[(len(mask),)](
        *lines, start, mask.contiguous(), limit, order, n, order.shape[1], SAME=SAME, SUM=rule == "sum", **lines.launch
    )
    return picks_of(order, counts, mask)


def slots(counts: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where picks go, `[B, K]` int64 zeros, and how many a row makes, `[B]` int64."""
    order = torch.zeros(len(mask), max(counts, default=0), dtype=torch.int64, device=mask.device)
    return order, torch.minimum(to_device(counts, mask.device), mask.sum(1))


class Lines(tuple):
    """All products of an image's tokens `[B, N, N]` fp32, and `[B, N]` fp32 factors that make them cosines.

    `launch`: keywords of the kernels that read a line of them at a time.
    """

    launch: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, eps: float = EPS) -> Lines:
        """From features `[B, N, D]`. fp32 is scaled first, as the references do; bf16 and fp16 are multiplied as they
        are, on tensor cores, and scaled by the products with themselves.

        Raises:
            NotServed: more than `HELD`, or see `check`.
        """
        check(x)
        rows, n, dim = x.shape
        if rows * n * n > HELD:
            raise NotServed(f"the cosines of {rows} x {n} tokens are more than {HELD}")
        x = (unit(x, eps) if x.dtype == torch.float32 else x).contiguous()
        cosines = torch.empty(rows, n, n, device=x.device)
        sizes = gemm_blocks(x, n, dim)
        side = min(sizes.rows, sizes.columns)
        tiles = triton.cdiv(n, side)
        _products[(tiles, tiles, rows)](
            x,
            cosines,
            n,
            dim,
            SIDE=side,
            INNER=sizes.inner,
            WIDEN=interpreted(),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
        if x.dtype == torch.float32:
            scale = torch.ones(rows, n, device=x.device)
        else:
            scale = cosines.diagonal(dim1=1, dim2=2).sqrt().clamp_(min=eps).reciprocal_()
        lines = cls((cosines, scale))
        block = triton.next_power_of_2(n)
        lines.launch = dict(BLOCK=block, num_warps=min(16, max(4, block // 256)))
        return lines


@triton.jit
def _products(x, out, n, dim, SIDE: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr):
    """A tile on or above the diagonal, and its mirror image."""
    top, left, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if left >= top:
        rows, columns = top * SIDE + tl.arange(0, SIDE), left * SIDE + tl.arange(0, SIDE)
        x += image * n * dim
        total = products(x, dim, rows, n, x, dim, columns, n, dim, SIDE, SIDE, INNER, WIDEN)
        out += image * n * n
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        tl.store(out + rows[:, None].to(tl.int64) * n + columns[None, :], total, mask=inside)
        tl.store(out + columns[None, :].to(tl.int64) * n + rows[:, None], total, mask=inside)


@triton.jit
def line_of(products, scale, image, pick, at, n):
    """The cosines of one token with all."""
    base = image * n
    own = tl.load(scale + base + at, mask=at < n, other=0.0)
    line = tl.load(products + (base + pick) * n + at, mask=at < n, other=0.0)
    return line * (own * tl.load(scale + base + pick))


@triton.jit
def best_of(key, offered):
    """Where `key` is largest among those offered; ties to the lowest place, NaN first of all, as in torch."""
    key = tl.where(key != key, float("inf"), key)
    return tl.argmax(tl.where(offered, key, float("-inf")), 0, tie_break_left=True).to(tl.int64)


@triton.jit
def distance_of(cosine, SAME: tl.constexpr):
    far = 1 - cosine
    return tl.where(far < SAME, 0.0, far)


@triton.jit
def _far_from_all(products, scale, mask, out, n, ROWS: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """Distance of some tokens to their nearest other candidate."""
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base = tl.program_id(1).to(tl.int64) * n
    mine = tl.load(scale + base + rows, mask=rows < n, other=0.0)
    theirs = tl.load(scale + base + at, mask=at < n, other=0.0)
    lines = tl.load(
        products + (base + rows[:, None]) * n + at[None, :], mask=(rows < n)[:, None] & (at < n)[None, :], other=0.0
    )
    candidate = tl.load(mask + base + at, mask=at < n, other=0).to(tl.int1)
    other = candidate[None, :] & (at[None, :] != rows[:, None])
    nearest = tl.max(tl.where(other, lines * (theirs[None, :] * mine[:, None]), float("-inf")), 1)
    tl.store(out + base + rows, distance_of(nearest, SAME), mask=rows < n)


@triton.jit
def _spread(
    products, scale, start, mask, limit, order, n, width, SAME: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    image, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(start + image * n + at, mask=at < n, other=0.0)
    offered = tl.load(mask + image * n + at, mask=at < n, other=0).to(tl.int1)
    for step in range(tl.load(limit + image)):
        pick = best_of(score, offered)
        tl.store(order + image * width + step, pick)
        offered = offered & (at != pick)
        cosine = line_of(products, scale, image, pick, at, n)
        far = distance_of(cosine, SAME)
        if SUM:
            gain = -tl.where(far == 0, 1.0, cosine)
            score = tl.where(step == 0, gain, score + gain)
        else:
            score = tl.where(step == 0, far, tl.minimum(score, far))


@triton.jit
def _veto(products, scale, weight, mask, limit, order, n, width, tau, BLOCK: tl.constexpr):
    image, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    heavy = tl.load(weight + image * n + at, mask=at < n, other=0.0)
    left = tl.load(mask + image * n + at, mask=at < n, other=0).to(tl.int1)
    free = left
    for step in range(tl.load(limit + image)):
        none_free = tl.max(free.to(tl.int32), 0) == 0
        pick = best_of(heavy, free | (left & none_free))
        tl.store(order + image * width + step, pick)
        left = left & (at != pick)
        cosine = line_of(products, scale, image, pick, at, n)
        free = free & left & (tl.where(cosine > 1, 1.0, cosine) <= tau)
