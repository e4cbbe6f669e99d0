"""Uniform: an evenly spread subset, the strongest baseline that looks at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.errors import ConfigError
from prune.kernels import topk_indices
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class Uniform(Reducer):
    """Keep tokens spread evenly over the image: evenly spaced rows, and evenly spaced tokens along these rows.

    Based on no paper: the baseline. Rows of all tiles and frames form one list, so that each gets its share of the
    tokens; 64 of 24 x 24 is a regular 8 x 8 grid. Above one half it is the dropped tokens that are spread evenly.
    Tokens without a place on the grid are kept only when all others are. Without coordinates the tokens are one row.

    Cost: O(N). No signals.

    Args:
        layer: None acts after the projector, k at the input of decoder layer k.

    Raises:
        ConfigError: `layer` is neither None nor a whole number >= 0.
    """

    layer: int | None = None

    name = "uniform"
    title = "Evenly spread subset (baseline)"

    def __post_init__(self):
        if self.layer is not None and self.layer < 0:
            raise ConfigError(f"layer={self.layer!r} must be None (after the projector) or a whole number >= 0")

    @property
    def site(self) -> str:
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        chosen = evenly_spread(tokens.mask, tokens.coordinates, keep)
        return Reduction(*topk_indices(chosen.float(), keep, tokens.mask))  # fills up with tokens that have no place


def evenly_spread(mask: Tensor, coordinates: Tensor | None, keep: Sequence[int]) -> Tensor:
    """`[B, N]` bool: `keep` (host ints) of every row's placed tokens, or all if there are fewer.

    Args:
        mask: `[B, N]` bool, the real tokens.
        coordinates: `[B, N, 4]` int64 (tile, frame, row, column), rows of the grid one after the other; or None.
    """
    placed, first = mask, torch.zeros_like(mask)
    first[:, :1] = True
    if coordinates is not None:
        placed = mask & (coordinates[..., 0] >= 0)
        first[:, 1:] = (coordinates[:, 1:, :3] != coordinates[:, :-1, :3]).any(-1)
    line = (first & placed).cumsum(1) - 1
    n, lines = placed.sum(1, keepdim=True), (first & placed).sum(1, keepdim=True)

    k = torch.tensor(list(keep)).to(mask.device, non_blocking=True)[:, None].minimum(n)
    dropped = k * 2 > n
    count = torch.where(dropped, n - k, k)
    # As many lines that the spacing along a line equals the spacing between lines.
    chosen_lines = (lines * (count / n.clamp(min=1)).sqrt()).round().long().clamp(min=1)
    along = placed & _every(line, lines, chosen_lines)
    spread = along & _every(along.cumsum(1) - 1, along.sum(1, keepdim=True), count)
    return placed & (spread ^ dropped)


def _every(position: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """True at `count` of the positions 0..length-1, at the middles of equal stretches; integer arithmetic only."""
    length = length.clamp(min=1)

    def middles_before(end):
        return (2 * count * end + length - 1) // (2 * length)

    return middles_before(position + 1) > middles_before(position)
