"""Greedy selection that weighs importance with diversity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compaction import take
from .greedy import SAME
from .similarity import dot, unit
from .tiles import group_extreme, group_sum, tile_groups, tile_shares


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

    Cost: O(K N D), one pass over `x` a pick; one fp32 copy of `x`. No host synchronisation.
    """
    group = tile_groups(tile, mask)
    share = tile_shares(keep, group, mask)
    score = importance.float().masked_fill(~mask, 0)
    low, high = (group_extreme(score, group, end) for end in ("amin", "amax"))
    score = torch.where(high > low, (score - low) / (high - low + 1e-8), 1.0)
    x = unit(x.float().masked_fill(~mask[..., None], 0))
    distance = torch.full_like(score, 3.0)  # above any cosine distance: nothing is picked yet
    chosen = torch.zeros_like(mask)
    for _ in range(max(keep, default=0)):
        is_open = mask & ~chosen & (group_sum(chosen, group) < share)
        pick = (score * distance).masked_fill(~is_open, -1.0).argmax(1, keepdim=True)
        picked = is_open.gather(1, pick)  # a row that is done picks nothing
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | picked)
        far = 1 - dot(x, take(x, pick))
        near = (group == group.gather(1, pick)) & picked
        distance = torch.where(near, distance.minimum(far.masked_fill(far < SAME, 0)), distance)
    return chosen
