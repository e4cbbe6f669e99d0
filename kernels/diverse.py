"""Greedy selection that weighs importance with diversity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import dispatched
from .greedy import SAME, RowDots
from .similarity import unit
from .tiles import group_extreme, tile_groups, tile_shares


@dispatched
@torch.no_grad()
def importance_times_distance(x: Tensor, importance: Tensor, keep: Sequence[int], tile: Tensor, mask: Tensor) -> Tensor:
    """Pick, tile by tile, the token with the largest importance times cosine distance to the nearest pick.

    Importance is scaled to [0, 1] inside every tile first (to 1 where all are equal); the first pick of a tile is its
    most important token. Every tile gets its share of the row's count.

    Args:
        x: `[B, N, D]` float.
        importance: `[B, N]` float.
        keep: per row, on the host; at most the real tokens.
        tile: `[B, N]` int64.
        mask: `[B, N]` bool.

    Returns:
        `[B, N]` bool. Ties go to the lowest index; distances below 1e-6 count as 0.

    Cost: O(K N D), one pass over `x` a pick, K = max(keep); one fp32 copy of `x`, on CUDA two. No host synchronisation.
        Bytes moved in torch: `x` in fp32 every pick, on CUDA three times; in Triton N^2 fp32 written once, and 2 N read
        every pick.
    """
    group = tile_groups(tile, mask)
    left, score = tile_shares(keep, group, mask), relative(importance, group, mask)
    cosines = RowDots(unit(x.masked_fill(~mask[..., None], 0)))
    distance = torch.full_like(score, 3.0)  # above any cosine distance: nothing is picked yet
    key, far, pick = torch.empty_like(score), torch.empty_like(score), cosines.pick
    nothing, one = score.new_full((), -1.0), score.new_ones(())
    chosen, open_, near, same = torch.zeros_like(mask), mask.clone(), torch.empty_like(mask), torch.empty_like(mask)
    picked, its_group = torch.empty_like(mask[:, :1]), torch.empty_like(group[:, :1])
    place = torch.arange(mask.shape[1], device=mask.device)
    for _ in range(max(keep, default=0)):
        torch.gt(left, 0, out=near).logical_and_(open_)
        torch.where(near, torch.mul(score, distance, out=key), nothing, out=key)
        torch.argmax(key, 1, keepdim=True, out=pick)
        torch.gather(near, 1, pick, out=picked)  # a row that is done picks nothing
        chosen.logical_or_(torch.eq(place, pick, out=near).logical_and_(picked))
        open_.logical_and_(near.logical_not_())
        torch.sub(one, cosines(), out=far)
        far.masked_fill_(torch.lt(far, SAME, out=same), 0)
        torch.eq(group, torch.gather(group, 1, pick, out=its_group), out=near).logical_and_(picked)
        left.add_(near, alpha=-1)
        torch.where(near, torch.minimum(distance, far, out=far), distance, out=distance)
    return chosen


def relative(importance: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """`importance` `[B, N]` scaled to [0, 1] inside every group, fp32; 1 where all are equal."""
    score = importance.float().masked_fill(~mask, 0)
    low, high = (group_extreme(score, group, end) for end in ("amin", "amax"))
    return torch.where(high > low, (score - low) / (high - low + 1e-8), 1.0)
