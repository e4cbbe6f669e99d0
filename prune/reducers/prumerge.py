"""PruMerge: the outliers of CLS attention, with their neighbours and the rest folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels import topk_indices
from prune.kernels.compaction import take
from prune.kernels.neighbours import cosine_topk
from prune.kernels.tiles import group_rank, group_sum, tile_groups, tile_shares
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Merge, Reduction, Tower, VisualTokens


@register
@dataclass
class PruMerge(Reducer):
    """Keep the tokens whose CLS attention is an outlier (and, "plus", tokens spread over the grid); fold their nearest
    neighbours into them and all dropped tokens into one more.

    Based on "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388).
    Attention and keys are those of the vision encoder's last layer with all heads joined to one. Outliers lie above the
    upper quartile by more than 1.5 times the interquartile range, over all tokens of an image; their share is the share
    of every tile that is kept by attention. PruMerge+ adds the tokens at every floor(floor(1 / share) / 3)-th place.
    A kept token becomes itself plus its 32 nearest (by cosine of keys) weighted by their attention, dropped or not;
    one token more, at the place of the most attended dropped one, is the attention-weighted sum of all dropped ones.

    The budget is an upper bound while `adaptive`: outliers come first, then that one token, then the spread ones,
    thinned evenly. Else it is met exactly.

    Where we differ from the authors' code:
        - an image's tiles take the place of its batch, whose images share one count: with PruMerge+ it knows batch 1;
        - the count has a bound: at a share above 1 / 6 the code's PruMerge+ keeps everything, above 1 / 3 it fails;
        - kept tokens stay in order; the code sorts them by attention, spread ones and the sum behind them;
        - the last place of a tile can be a spread one, and without `adaptive` they are as many as the others, none
          twice; `compat=True` is the code's, with `ratio` 1 / 8 the one it was trained with.

    Cost: O(K N C) for keys of width C, beside the signals; one more pass of the projector over the kept tokens with
    `space="tower"`.

    Args:
        variant: "plus" (PruMerge+, what the code runs) or "base".
        adaptive: whether the content decides on the count.
        ratio: share of a tile's tokens kept by attention in "plus" without `adaptive`; None is half of the budget.
        neighbours: folded into every kept token, >= 0 (32 in the code).
        space: "tower" merges before the projector, as the paper; "here" after it.
        compat: spread tokens as in the authors' code.

    Raises:
        ConfigError: an option is out of range.
    """

    variant: str = "plus"
    adaptive: bool = True
    ratio: float | None = None
    neighbours: int = 32
    space: str = "tower"
    compat: bool = False

    name = "prumerge"
    title = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
    arxiv = "2403.15388"
    tower = {
        "attention": Tower("joint_cls_attention", -1),
        "keys": Tower("keys", -1),
    }
    merges = True
    positions = "compact"

    def __post_init__(self):
        if self.variant not in ("plus", "base"):
            raise ConfigError(f"variant={self.variant!r} must be 'plus' or 'base'")
        if self.ratio is not None and (self.adaptive or self.variant == "base" or not 0 < self.ratio <= 1):
            raise ConfigError(f"ratio={self.ratio!r} must be None, or in (0, 1] for variant 'plus' with adaptive=False")
        if self.neighbours < 0:
            raise ConfigError(f"neighbours={self.neighbours!r} must be a whole number >= 0")
        if self.space not in ("here", "tower"):
            raise ConfigError(f"space={self.space!r} must be 'here' or 'tower'")

    @property
    def needs_projector(self) -> bool:
        return self.space == "tower"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        mask, group = tokens.mask, tile_groups(tokens.tile, tokens.mask)
        attention = tokens.tower["attention"].float().masked_fill(~mask, 0)
        chosen, total = self._choose(attention, group, mask, keep)
        index, valid = topk_indices((chosen | total).float(), keep, chosen | total)
        keys, real = tokens.tower["keys"].flatten(2), group.masked_fill(~mask, -1)
        source, cosine = cosine_topk(take(keys, index), keys, self.neighbours, group.gather(1, index), real, index)
        close = cosine > -torch.inf
        number = torch.arange(index.shape[1], device=index.device)[:, None].expand(*source.shape)
        weight = attention.gather(1, source.flatten(1)).view_as(close) * close
        weight = weight * (valid & chosen.gather(1, index))[..., None]
        slots = (chosen | total).long().cumsum(1) - 1
        place = torch.arange(mask.shape[1], device=index.device).expand_as(group)
        dropped = mask & ~chosen & ~total & (group_sum(total, group) > 0)
        sink = group_sum(torch.where(total, slots, 0), group)
        source = torch.cat([source.flatten(1), place], 1)
        slot = torch.cat([number.flatten(1), sink.masked_fill(~dropped, 0)], 1)
        weight = torch.cat([weight.flatten(1), attention * dropped], 1)
        source = torch.where(weight > 0, source, index[:, :1])  # padding may hold NaN, also at weight 0
        scale = torch.where(total, attention, 1).gather(1, index)
        return Reduction(index, valid, Merge(source, slot, weight, scale, self.space))

    def _choose(self, attention: Tensor, group: Tensor, mask: Tensor, keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The kept tokens, and those in whose place the sum of their tile's dropped ones goes; both `[B, N]` bool."""
        size, share = group_sum(mask, group), tile_shares(keep, group, mask)
        room = torch.where(share < size, (share - 1).clamp(min=0), share)
        if self.adaptive:
            outlying, count = outliers(attention, mask), mask.sum(1, keepdim=True)
            few = size * outlying // count.clamp(min=1)
            step = count // outlying.clamp(min=1) // 3  # floor(1 / share), and a third of it
            if self.compat:  # the code's doubles: int(196 * (27 / 196)) is 26
                part = outlying.double() / count.clamp(min=1)
                few, step = (size * part).long(), (1 / part.clamp(min=1e-9)).long() // 3
            first = 0
        elif self.ratio is None:
            few, step, first = room if self.variant == "base" else (room + 1) // 2, torch.ones_like(size), 0
        else:
            few = (size.double() * self.ratio).long()
            first, step = int(1 / self.ratio) // 2, torch.full_like(size, int(1 / self.ratio))
        chosen = group_rank(attention, group, mask) < few.minimum(room)
        if self.variant == "plus":
            place = group_rank(torch.zeros_like(group), group, mask)
            grid = mask & (place >= first) & ((place - first) % step.clamp(min=1) == 0)
            if self.compat:
                grid &= place < size - 1
            spread = grid & ~chosen if self.adaptive or self.compat else mask & ~chosen
            chosen = chosen | evenly(spread, room - group_sum(chosen, group), group)
            if not self.adaptive:
                rest = mask & ~chosen
                chosen = chosen | (group_rank(attention, group, rest) < room - group_sum(chosen, group))
        total = (group_rank(attention, group, mask & ~chosen) == 0) & (group_sum(chosen, group) < share)
        return chosen, total

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        width = geometry.tower_width
        return 2 * geometry.visual_tokens * keep * width if self.neighbours else 0


def outliers(attention: Tensor, mask: Tensor) -> Tensor:
    """`[B, 1]`: how many of `attention` `[B, N]` fp32 lie above the upper quartile by 1.5 interquartile ranges."""
    quarter = torch.tensor([0.25, 0.75]).to(attention.device, non_blocking=True)
    low, high = attention.masked_fill(~mask, torch.nan).nanquantile(quarter, dim=1)[..., None]
    return (mask & (attention > high + 1.5 * (high - low))).sum(1, keepdim=True)


def evenly(candidates: Tensor, count: Tensor, group: Tensor) -> Tensor:
    """`count` `[B, N]` (of a token's group) of the `candidates` `[B, N]` bool, spread evenly; at most all of them."""
    rank = group_rank(torch.zeros_like(group), group, candidates)
    total = group_sum(candidates, group).clamp(min=1)
    count = count.minimum(total)
    return candidates & ((2 * (rank + 1) * count + total) // (2 * total) > (2 * rank * count + total) // (2 * total))
