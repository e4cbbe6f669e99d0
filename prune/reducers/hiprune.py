"""HiPrune: object tokens of a middle layer of the vision encoder, their neighbours, global tokens of a deep one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.errors import ConfigError
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups, tile_shares
from prune.kernels.topk import topk_indices
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens


@register
@dataclass
class HiPrune(Reducer):
    """Keep anchors (most attended in a middle layer of the vision encoder), their grid neighbours, and registers (most
    attended in a deep layer) for the rest of the budget.

    Based on "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in VLMs" (arXiv 2508.00553).
    Attention a token receives is the mean over all queries and heads. A tile that keeps V tokens has
    round(V * alpha / 5) anchors (ties to even: 192 -> 4, 128 -> 3, 64 -> 1). Every tile gets its share of the budget.

    Where we differ from the authors' code:
        - neighbours are those of the grid, as in the paper; the code's wrap into the next row at the right edge, and
          above the first row and below the last one they become the tile's first and last token (`compat=True`);
        - tokens taken already are excluded, as in the paper; the code for Qwen subtracts 1 from scores far above 1,
          picks some tokens twice and keeps fewer than it was asked to;
        - anchors and neighbours that exceed the budget are cut, neighbours first, by deep attention; the code fails;
        - the shares of tiles add up to the budget; the code loses the remainder.

    Cost: O(N log N) beside the signals. Positions: renumbered, as in the code for LLaVA (that for Qwen keeps them).

    Args:
        alpha: share of anchors and neighbours in the budget, in [0, 1] (0.1 in the paper).
        object_layer: of the vision encoder, see `prune.tokens.Tower`: the paper's 9th of 24 for CLIP. For Qwen2.5-VL
            it takes the 16th of 32: 0.5.
        deep_layer: None is the layer the projector reads, the paper's choice.
        compat: neighbours by index, as in the authors' code.

    Raises:
        ConfigError: an option is out of range.
    """

    alpha: float = 0.1
    object_layer: int | float | None = 9 / 24
    deep_layer: int | float | None = None
    compat: bool = False

    name = "hiprune"
    title = "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in VLMs"
    arxiv = "2508.00553"
    positions = "compact"

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} must be a number in [0, 1]")
        self.tower  # noqa: B018 - checks the layers

    @property
    def tower(self) -> dict[str, Tower]:
        return {
            "object": Tower("received_attention", self.object_layer),
            "deep": Tower("received_attention", self.deep_layer),
        }

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        anchor, buffer, share = anchors(tokens, keep, self.alpha, self.compat)
        group = tile_groups(tokens.tile, tokens.mask)
        # Three tiers; the margin keeps them apart whatever the scores are.
        score = tokens.tower["deep"].float().masked_fill(~tokens.mask, 0)
        order = group_rank(score, group, tokens.mask) - score.shape[1] * (buffer + 2 * anchor)
        chosen = group_rank(-order, group, tokens.mask) < share
        return Reduction(*topk_indices(chosen.float(), keep, tokens.mask))


@torch.no_grad()
def anchors(tokens: VisualTokens, keep: Sequence[int], alpha: float, compat: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and their neighbours, both `[B, N]` bool, and the share `[B, N]` of every token's tile; see `HiPrune`.

    Without `tokens.patch` a tile is one line.
    """
    mask = tokens.mask
    group = tile_groups(tokens.tile, mask)
    share = tile_shares(keep, group, mask)
    count = (share.double() * alpha / 5).round()  # half to even
    anchor = group_rank(tokens.tower["object"].float(), group, mask) < count

    index = torch.arange(mask.shape[1], device=mask.device).expand_as(group)
    place = group_rank(-index, group, mask)  # number inside the tile
    row, column = tokens.patch.unbind(-1) if tokens.patch is not None else (torch.zeros_like(place), place)
    row, column = (x.masked_fill(~mask, 0) for x in (row, column))
    width = group_extreme(column, group, "amax") + 1
    if compat:
        last = group_sum(mask, group) - 1
        near = [(place + step).clamp(min=0).minimum(last) for step in (-1, 1, -width, width)]
        row, near = torch.zeros_like(row), [(torch.zeros_like(row), x) for x in near]
        column = place
    else:
        near = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
    reached = torch.zeros_like(anchor)
    for target_row, target_column in near:
        at, found = _find((group, row, column), (group, target_row, target_column), mask)
        reached |= torch.zeros_like(place).scatter_add_(1, at, (found & anchor).long()) > 0
    return anchor, reached & ~anchor & mask, share


def _find(places: tuple[Tensor, ...], targets: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Index `[B, N]` of the first token at each of the (group, row, column) `targets`, and whether there is one."""
    key, wanted = ((group << 40) + ((row + 1) << 20) + column + 1 for group, row, column in (places, targets))
    ordered, source = key.masked_fill(~mask, torch.iinfo(torch.int64).max).sort(dim=1, stable=True)
    at = torch.searchsorted(ordered, wanted).clamp(max=key.shape[1] - 1)
    return source.gather(1, at), ordered.gather(1, at) == wanted
