"""Per-tile arithmetic without splitting the rows: every token carries its tile's sums, ranks and shares.

A group is a tile of one row. How many there are is known on the device only, so nothing here has a tile axis; all
results are per token, `[B, N]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .topk import host_counts, to_device, topk_mask


def tile_groups(tile: Tensor, mask: Tensor) -> Tensor:
    """Number the tiles of every row 0, 1, ... in ascending order of `tile` `[B, N]` int64; padding is one group more.

    Returns:
        `[B, N]` int64 below N. Cost: one sort.
    """
    ordered, source = tile.masked_fill(~mask, torch.iinfo(tile.dtype).max).sort(1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(ordered).scatter_(1, source, steps.cumsum(1))


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """The sum of `x` `[B, N]` (numbers, or bool to count) over every token's group, `[B, N]` in x's dtype or int64."""
    x = x.long() if x.dtype == torch.bool else x
    return torch.zeros_like(x).scatter_add_(1, group, x).gather(1, group)


def group_extreme(x: Tensor, group: Tensor, reduce: str) -> Tensor:
    """The largest ("amax") or smallest ("amin") `x` `[B, N]` of every token's group."""
    return torch.zeros_like(x).scatter_reduce_(1, group, x, reduce, include_self=False).gather(1, group)


def group_rank(scores: Tensor, group: Tensor, candidates: Tensor) -> Tensor:
    """How many candidates of a token's group score higher than it; ties go to the lowest index, NaN ranks last.

    Args:
        scores: `[B, N]`.
        group: `[B, N]` from `tile_groups`.
        candidates: `[B, N]` bool; the others get rank N.

    Returns:
        `[B, N]` int64. Cost: two stable sorts.
    """
    n = scores.shape[1]
    falling = -scores if not scores.is_floating_point() else (-scores).masked_fill(scores.isnan(), math.nan)
    order = falling.sort(dim=1, stable=True).indices
    key = group.masked_fill(~candidates, n).gather(1, order)
    key, second = key.sort(dim=1, stable=True)
    position = torch.arange(n, device=scores.device).expand_as(key)
    begins = torch.ones_like(key, dtype=torch.bool)
    begins[:, 1:] = key[:, 1:] != key[:, :-1]
    start = torch.where(begins, position, 0).cummax(1).values
    rank = torch.empty_like(key).scatter_(1, order.gather(1, second), position - start)
    return rank.masked_fill(~candidates, n)


def tile_shares(keep: Sequence[int], group: Tensor, mask: Tensor) -> Tensor:
    """Split every row's count over its tiles in proportion to their tokens, by largest remainder, ties to the first.

    Args:
        keep: per row the count to split, on the host; at most the row's real tokens.
        group: `[B, N]` from `tile_groups`.
        mask: `[B, N]` bool, the real tokens.

    Returns:
        `[B, N]` int64: the share of every token's tile; 0 at padding. A row's tiles get `keep` together.
    """
    total = to_device(host_counts(keep, len(mask)), mask.device)[:, None]
    size = torch.zeros_like(group).scatter_add_(1, group, mask.long())  # of group g, in column g
    product, count = total * size, mask.sum(1, keepdim=True).clamp(min=1)
    whole, remainder = product // count, product % count
    share = whole + topk_mask(remainder.double(), (total - whole.sum(1, keepdim=True))[:, 0], size > 0)
    return share.gather(1, group) * mask
