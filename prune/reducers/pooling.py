"""Pooling: average the grid down to the budget, a baseline that merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.kernels import topk_indices
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups, tile_shares
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens


@register
@dataclass
class Pooling(Reducer):
    """After the projector, cut every grid into as many cells as the budget has tokens, and keep the mean of each.

    Based on no paper: the baseline of methods that merge. Every tile and frame gets its share V of the budget. Its
    h x w grid is cut into about sqrt(V h / w) bands of rows, and the bands into V cells together, all of nearly equal
    size: 64 of 24 x 24 are 8 x 8 cells of 3 x 3. The mean takes the place of the token next to the middle of its cell.
    Where an earlier stage left holes in the grid, empty cells make room for the first tokens of others, which stay
    what they are. Without coordinates the tokens are one row.

    Cost: O(N log N). No signals.
    """

    name = "pooling"
    title = "Average pooling of the grid (baseline)"
    merges = True

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        mask = tokens.mask
        cell, row, column, pooled = cells(mask, tokens.coordinates, keep)
        centre = pooled & (group_rank(-_off_centre(cell, row, column, pooled), cell, pooled) == 0)
        index, valid = topk_indices(centre.float(), keep, mask)
        n = mask.shape[1]
        kept = torch.zeros(len(mask), n + 1, dtype=torch.bool, device=mask.device)
        kept = kept.scatter(1, torch.where(valid, index, n), True)[:, :n]
        folded = pooled & ~kept
        size = group_sum(folded | centre, cell)
        slot = group_sum(torch.where(centre, kept.long().cumsum(1) - 1, 0), cell)
        everyone = torch.arange(n, device=mask.device).expand_as(slot)
        merge = Merge(
            source=torch.where(folded, everyone, index[:, :1]),  # padding may hold NaN, also at weight 0
            slot=slot.masked_fill(~folded, 0),
            weight=folded / size.clamp(min=1),
            scale=torch.where(centre, 1 / size.clamp(min=1), 1.0).gather(1, index),
        )
        return Reduction(index, valid, merge)


@torch.no_grad()
def cells(mask: Tensor, coordinates: Tensor | None, keep: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cell of every token, its row and column, and whether it is pooled at all; all `[B, N]`; see `Pooling`.

    Args:
        mask: `[B, N]` bool.
        coordinates: `[B, N, 4]` int64 (tile, frame, row, column), or None.
        keep: per row, on the host.
    """
    n = mask.shape[1]
    if coordinates is None:
        column = torch.arange(n, device=mask.device).expand_as(mask)
        grid, row = torch.zeros_like(column), torch.zeros_like(column)
    else:
        tile, frame, row, column = coordinates.unbind(-1)
        grid, row, column = (tile << 32) + frame, row.clamp(min=0), column.clamp(min=0)
    group = tile_groups(grid, mask)
    share = tile_shares(keep, group, mask)
    pooled = mask & (share > 0)
    row, column = (x.masked_fill(~pooled, 0) for x in (row, column))
    high, wide = (group_extreme(x, group, "amax") + 1 for x in (row, column))
    share = share.clamp(min=1)
    bands = (share * high / wide).sqrt().round().long()
    bands = bands.maximum((share + wide - 1) // wide).minimum(high.minimum(share))
    band = row * bands // high
    first, after = band * share // bands, (band + 1) * share // bands
    cell = first + column * (after - first) // wide
    return tile_groups(group * (n + 1) + cell, mask), row, column, pooled


def _off_centre(cell: Tensor, row: Tensor, column: Tensor, pooled: Tensor) -> Tensor:
    """`[B, N]` int64, grows with the distance from the mean place of the token's cell."""
    size = group_sum(pooled, cell)
    return sum((x * size - group_sum(x * pooled, cell)).square() for x in (row, column))
