"""Greedy MAP of determinantal point processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import dispatched
from .greedy import RowDots, every, picks_of
from .quota import quotas
from .similarity import unit
from .topk import host_counts

SPENT = 1e-6
"""Share of a token's own weight below which what is left of it is rounding."""


@dispatched
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

    Cost: O(k N (D + k)): one row of cosines and one row of the decomposition a step. Memory O(N (D + k)), in Triton
        O(N (N + k)). No host synchronisation. Bytes moved in torch: in step i `x` in fp32 and i numbers a token, on
        CUDA three times, for products are written and read back; in Triton N^2 fp32 written once, and N (i + 2) read in
        step i.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    n, counts = x.shape[1], host_counts(k, len(x))
    mask = every(x) if mask is None else mask
    open_, left = mask.clone(), None if tile is None else quotas(tile, counts, mask)
    x, quality = unit(x), quality.float().masked_fill(~mask, 0)
    own = quality.square().masked_fill((x == 0).all(-1), 0)
    rest, spent = own.clone(), SPENT * own
    order = torch.zeros(len(x), max(counts, default=0), dtype=torch.int64, device=x.device)
    width = min(order.shape[1], n)
    factors = x.new_zeros(len(x), n, width)
    cosines, done = RowDots(x), RowDots(factors)
    pick = done.pick = cosines.pick
    key, column, lowest = torch.empty_like(rest), torch.empty_like(rest), rest.new_full((), -torch.inf)
    allowed, same, outside = torch.empty_like(mask), torch.empty_like(mask), ~mask
    of_pick, exhausted = torch.empty_like(rest[:, :1]), torch.empty_like(mask[:, :1])
    its_tile = None if tile is None else torch.empty_like(tile[:, :1])
    tiny = torch.finfo(x.dtype).tiny
    for step in range(width):
        allowed.copy_(open_)
        if tile is not None:
            allowed.logical_and_(torch.gt(left, 0, out=same))
        torch.argmax(torch.where(allowed, rest, lowest, out=key), 1, keepdim=True, out=pick)
        order[:, step : step + 1] = pick
        open_.scatter_(1, pick, False)
        torch.mul(quality, torch.gather(quality, 1, pick, out=of_pick), out=column).mul_(cosines())
        if tile is not None:
            torch.eq(tile, torch.gather(tile, 1, pick, out=its_tile), out=same)
            column.mul_(same)
            left.add_(same, alpha=-1)
        # No matrix product, so that equal tokens keep equal bits.
        torch.le(torch.gather(rest, 1, pick, out=of_pick), 0, out=exhausted)
        column.sub_(done(step)).div_(of_pick.clamp_(min=tiny).sqrt_())
        column.masked_fill_(exhausted, 0).masked_fill_(outside, 0)
        factors[..., step] = column
        rest.sub_(column.square_())
        rest.masked_fill_(torch.le(rest, spent, out=same), 0)
    return picks_of(order, counts, mask)
