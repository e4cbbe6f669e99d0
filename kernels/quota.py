"""Top-k with a share for every tile, by the rule of codes that keep `int(ratio * n)` of each tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tiles import group_rank, group_sum, tile_groups
from .topk import topk_indices


@torch.no_grad()
def quota_topk(scores: Tensor, tile: Tensor, k: int | Sequence[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The highest-scored tokens of every tile of a row, `k` in all.

    Jefferson's rule: a tile of n tokens gets int(ratio * n), with the one ratio for which that makes `k`. If several
    tiles claim the last places equally, the one whose token has the lowest index gets them. Unlike with largest
    remainders (`tile_shares`), no tile gets less for a larger `k`.

    Args:
        scores: `[B, N]`; ties go to the lowest index, NaN ranks last.
        tile: `[B, N]` int64.
        k: tokens per row, one count for all or one per row; host ints.
        mask: `[B, N]` bool, the candidates.

    Returns:
        `index` and `valid` `[B, K]`, as of `topk_indices`. Cost: three sorts of `[B, N]` and that of `topk_indices`; no
        host synchronisation.
    """
    group = tile_groups(tile, mask)
    rank = group_rank(scores, group, mask) + 1
    # In fp64 equal fractions stay equal, and different ones of whole numbers below 2^26 different.
    return topk_indices(-(rank.double() / group_sum(mask, group).clamp(min=1)), k, mask)


def quotas(tile: Tensor, k: int | Sequence[int], mask: Tensor) -> Tensor:
    """`[B, N]` int64: how many places `quota_topk` gives to every token's tile."""
    group = tile_groups(tile, mask)
    index, valid = quota_topk(torch.zeros_like(tile), tile, k, mask)
    chosen = torch.zeros_like(tile).scatter_add_(1, index, valid.long())
    return group_sum(chosen, group)
