"""Cosine similarities, in fp32 whatever the input's dtype and autocast state, and never N x N at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import dispatched

EPS = 1e-8


def unit(x: Tensor, eps: float = EPS) -> Tensor:
    """Rows of `[..., D]` scaled to length 1, in fp32. A row shorter than `eps` is divided by `eps`: zero stays zero."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of `x` `[..., D]` with `y` `[..., D]`, row by row (broadcast); the cosine if both are `unit`.

    Every row is summed in the same order, so equal pairs, and (a, b) and (b, a), give equal bits. A matrix product
    promises neither (nor fp32, under autocast or TF32), and rounding would then decide ties.

    Cost: O(N D), one temporary of the broadcast shape.
    """
    return (x * y).sum(-1)


def cosine_similarity(x: Tensor, y: Tensor, eps: float = EPS) -> Tensor:
    """All cosines `[B, N, M]` between `x` `[B, N, D]` and `y` `[B, M, D]`, in fp32.

    For one small side: the result is allocated whole. A padded row spoils its own cosines only.

    Cost: O(N M D), one matrix product (TF32 where the caller has switched that on for CUDA).
    """
    with torch.autocast(x.device.type, enabled=False):  # autocast would run an fp32 product in half precision
        return unit(x, eps) @ unit(y, eps).transpose(-1, -2)


@dispatched
def cosine_reduce(
    x: Tensor,
    y: Tensor | None = None,
    reduce: str = "max",
    mask: Tensor | None = None,
    chunk: int = 1024,
    eps: float = EPS,
) -> Tensor:
    """The largest cosine of every token to a set of tokens, or the sum of its cosines.

    Args:
        x: `[B, N, D]` float. Results at padding are arbitrary.
        y: `[B, M, D]` float; None compares every token of `x` with all the OTHER tokens of `x`.
        reduce: "max" or "sum".
        mask: `[B, M]` bool, the rows of `y` that count (of `x` where y is None); None means all. What the other rows
            hold, NaN included, has no influence.
        chunk: rows of `x` compared at a time: the peak temporary of "max" is `[B, chunk, M]` fp32.
        eps: as in `unit`.

    Returns:
        `[B, N]` fp32; over an empty set -inf for "max" and 0 for "sum".

    Cost: "max" O(N M D) in chunks; "sum" O((N + M) D), for a sum of cosines is one cosine product with the sum.
    Triton finds the nearest from tiles of x and y in their own dtype (half precision: tensor cores, products exact in
    fp32). Bytes moved in torch: x and y in fp32, and N M cosines written and read; in Triton x and y once per tile of
    the other, and `[B, N]`; both then measure the nearest by `dot`: 2 N D fp32 gathered, multiplied and summed.

    Raises:
        ValueError: another `reduce`.
    """
    if reduce not in ("max", "sum"):
        raise ValueError(f"reduce={reduce!r} must be 'max' or 'sum'")
    others = y is None
    rows = unit(x, eps)
    columns = rows if others else unit(y, eps)
    if mask is not None:
        columns = columns.masked_fill(~mask[..., None], 0)
    if reduce == "sum":
        total = dot(rows, columns.sum(1, keepdim=True))
        return total - dot(rows, columns) if others else total
    starts = range(0, max(1, rows.shape[1]), chunk)
    parts = [_nearest(rows[:, i : i + chunk], columns, mask, i if others else None) for i in starts]
    return measure(rows, columns, torch.cat(parts, 1), chunk)


def measure(rows: Tensor, columns: Tensor, nearest: Tensor, chunk: int) -> Tensor:
    """`[B, N]`: `dot` of every row `[B, N, D]` with one of the columns `[B, M, D]`, -inf where `nearest` is -1.

    The matrix product finds the neighbour, the plain product measures it: see `dot` on ties.
    """
    if columns.shape[1] == 0:
        return rows.new_full(rows.shape[:2], -torch.inf)
    index = nearest.clamp(min=0)[..., None].expand(-1, -1, columns.shape[-1])
    parts = (dot(row, columns.gather(1, at)) for row, at in zip(rows.split(chunk, 1), index.split(chunk, 1)))
    return torch.cat([*parts], 1).masked_fill(nearest < 0, -torch.inf)


def _nearest(rows: Tensor, columns: Tensor, mask: Tensor | None, start: int | None) -> Tensor:
    """The nearest of the unit `columns` to unit `rows`, -1 if there is none; row i is column `start + i`, not its own
    peer."""
    if columns.shape[1] == 0:
        return torch.full(rows.shape[:2], -1, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        cosine = rows @ columns.transpose(1, 2)
    if mask is not None:
        cosine = cosine.masked_fill_(~mask[:, None], -torch.inf)
    if start is not None:
        cosine.diagonal(start, 1, 2).fill_(-torch.inf)
    best, index = cosine.max(-1)
    return index.masked_fill(best == -torch.inf, -1)
