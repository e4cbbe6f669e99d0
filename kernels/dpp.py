"""Greedy MAP of determinantal point processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compaction import take
from .quota import quotas
from .similarity import dot, unit
from .topk import host_counts, to_device

SPENT = 1e-6
"""Share of a token's own weight below which what is left of it is rounding."""


@torch.no_grad()
def dpp_map(
    x: Tensor, quality: Tensor, k: int | Sequence[int], mask: Tensor | None = None, tile: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the DPP with kernel `quality_i * cosine_ij * quality_j`: good tokens, unlike each other.

    Every step picks the token that adds most to the determinant: the largest remaining diagonal entry of the kernel's
    incremental Cholesky decomposition. When the rank is exhausted, the remaining entries are 0, and the remaining picks
    go to the tokens of the lowest index; no token is picked twice. Ties go to the lowest index.

    Args:
        x: `[B, N, D]` float; everything in fp32.
        quality: `[B, N]`, >= 0.
        k: picks per row, one count for all or one per row; host ints.
        mask: `[B, N]` bool, the candidates; None means all. What the other rows hold has no influence.
        tile: `[B, N]` int64: tokens of different tiles have cosine 0, and every tile gets its share of the picks (see
            `quotas`). None: one tile.

    Returns:
        `order` `[B, K]` int64, the picks in the order they were made, and `valid` `[B, K]` bool with K = max(k); slots
        beyond a row's k or its number of candidates come last, are not valid and hold index 0.

    Cost: O(k N (D + k)): one row of cosines and one row of the decomposition a step. Memory O(N (D + k)). No host
        synchronisation.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    rows, n, _ = x.shape
    counts = host_counts(k, rows)
    if mask is None:
        mask = torch.ones(rows, n, dtype=torch.bool, device=x.device)
    width = min(max(counts, default=0), n)
    open_, left = mask.clone(), None if tile is None else quotas(tile, counts, mask)
    x, quality = unit(x), quality.float().masked_fill(~mask, 0)
    own = quality.square().masked_fill((x == 0).all(-1), 0)
    rest = own.clone()
    factors = x.new_zeros(rows, n, width)
    order = torch.zeros(rows, max(counts, default=0), dtype=torch.int64, device=x.device)
    for step in range(width):
        allowed = open_ if left is None else open_ & (left > 0)
        pick = rest.masked_fill(~allowed, -torch.inf).argmax(1, keepdim=True)
        order[:, step : step + 1] = pick
        open_.scatter_(1, pick, False)
        kernel = quality * take(quality, pick) * dot(x, take(x, pick))
        if tile is not None:
            same = tile == tile.gather(1, pick)
            kernel, left = kernel * same, left - same.long()
        # No matrix product, so that equal tokens keep equal bits.
        done = factors[..., :step]
        weight = rest.gather(1, pick)
        column = (kernel - dot(done, take(done, pick))) / weight.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
        column = column.masked_fill((weight <= 0) | ~mask, 0)
        factors[..., step] = column
        rest = rest - column.square()
        rest = rest.masked_fill(rest <= SPENT * own, 0)
    limit = torch.minimum(to_device(counts, x.device), mask.sum(1))
    valid = torch.arange(order.shape[1], device=x.device) < limit[:, None]
    return order.masked_fill(~valid, 0), valid
