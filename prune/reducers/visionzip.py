"""VisionZip: dominant tokens by CLS attention, and contextual tokens that the others are merged into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels import topk_indices, unit
from prune.kernels.compaction import take
from prune.kernels.tiles import group_rank, group_sum, tile_groups, tile_shares
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Merge, Reduction, Tower, VisualTokens

SIGNALS = {
    "cls": {"attention": Tower("cls_attention"), "keys": Tower("keys")},
    "received": {"attention": Tower("received_attention", -1), "keys": Tower("keys", -1)},
}
"""What `score` may be, and what is then read."""

ELEMENTS = 1 << 26
"""Cosines held at a time."""


@register
@dataclass
class VisionZip(Reducer):
    """Keep the tokens CLS attends to most, and merge the rest into a few that lie evenly among them.

    Based on "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467). Scores and
    keys are those of the vision encoder's layer the projector reads. Of the tokens that are not dominant, in order,
    every floor(R / C)-th is a contextual one; each other joins the contextual token whose key (mean over heads) is
    nearest by cosine, and the mean of those that joined is ADDED to it, which about doubles its length, before the
    projector. Every tile of an image gets its share of the budget.

    Where we differ from the authors' code:
        - CLS itself is not kept, for it has no column in the prompt: its place goes to one more dominant token;
        - merged tokens stay where their contextual token was; the code puts them behind all others;
        - one split for all budgets, 54 + 10 of 64, gives the published 108 + 20, 162 + 30 and 27 + 5 too;
        - every count, tile and grid works; the code knows 24 layers, 576 tokens, and un-padded images only in part.

    `score="received"` is the port to Qwen2.5-VL: attention a token receives, and keys, of the last layer; with
    `space="here"` it merges after the projector, as that port does.

    Cost: O(N C d) for C contextual tokens and keys of width d, beside the signals; one more pass of the projector over
    the kept tokens with `space="tower"`.

    Args:
        contextual: share of the budget for contextual tokens, in [0, 1), or their number in every tile.
        score: "cls", or "received" for vision encoders without CLS.
        space: "tower" merges before the projector, "here" after it.

    Raises:
        ConfigError: an option is out of range.
    """

    contextual: float | int = 10 / 64
    score: str = "cls"
    space: str = "tower"

    name = "visionzip"
    title = "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    arxiv = "2412.04467"
    merges = True
    positions = "compact"

    def __post_init__(self):
        c = self.contextual
        if not (isinstance(c, int) and c >= 0 or isinstance(c, float) and 0 <= c < 1):
            raise ConfigError(f"contextual={c!r} must be a share in [0, 1) or a whole number of tokens")
        if self.score not in SIGNALS:
            raise ConfigError(f"score={self.score!r} must be 'cls' or 'received'")
        if self.space not in ("here", "tower"):
            raise ConfigError(f"space={self.space!r} must be 'here' or 'tower'")

    @property
    def tower(self) -> dict[str, Tower]:
        return SIGNALS[self.score]

    @property
    def needs_projector(self) -> bool:
        return self.space == "tower"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        group = tile_groups(tokens.tile, tokens.mask)
        dominant, target = split(tokens.tower["attention"], group, tokens.mask, keep, self.contextual)
        index, valid = topk_indices((dominant | target).float(), keep, tokens.mask)
        rest = tokens.mask & ~dominant & ~target
        metric = tokens.tower["keys"].float().mean(2)
        home = nearest_target(metric, rest, target, group, self._most(max(keep)))
        everyone = torch.arange(rest.shape[1], device=rest.device).expand_as(home)
        merged = home != everyone
        joined = torch.zeros_like(home).scatter_add_(1, home, merged.long())
        weight = merged / joined.gather(1, home).clamp(min=1)
        slot = ((dominant | target).long().cumsum(1) - 1).gather(1, home)
        source = torch.where(merged, everyone, index[:, :1])  # padding may hold NaN, also at weight 0
        return Reduction(index, valid, Merge(source, slot.masked_fill(~merged, 0), weight, space=self.space))

    def _most(self, keep: int) -> int:
        """No fewer than the contextual tokens of a row: round(x) is at most 2 x."""
        return min(keep, ceil(2 * self.contextual * keep)) if isinstance(self.contextual, float) else keep

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        head = geometry.tower_width // geometry.tower_heads
        return 2 * geometry.visual_tokens * self._most(keep) * head


@torch.no_grad()
def split(
    attention: Tensor, group: Tensor, mask: Tensor, keep: Sequence[int], contextual: float | int
) -> tuple[Tensor, Tensor]:
    """The dominant tokens and the contextual ones others may join, both `[B, N]` bool; see `VisionZip`.

    Args:
        attention: `[B, N]`.
        group: `[B, N]` of `tile_groups`.
        mask: `[B, N]` bool.
        keep: per row, on the host.
    """
    share = tile_shares(keep, group, mask)
    few = torch.full_like(share, contextual) if isinstance(contextual, int) else (share.double() * contextual).round()
    few = few.long().minimum(share)
    dominant = group_rank(attention.float(), group, mask) < share - few
    rest = mask & ~dominant
    number = group_rank(torch.zeros_like(group), group, rest)  # in ascending order
    step = group_sum(rest, group) // few.clamp(min=1)
    target = rest & (number % step.clamp(min=1) == 0) & (number // step.clamp(min=1) < few)
    return dominant, target


@torch.no_grad()
def nearest_target(x: Tensor, rest: Tensor, target: Tensor, group: Tensor, most: int) -> Tensor:
    """For every token that is `rest` the index of the `target` of its group with the nearest `x`, else its own index.

    Args:
        x: `[B, N, D]`.
        rest, target: `[B, N]` bool.
        group: `[B, N]` of `tile_groups`.
        most: no fewer than the targets of a row; host int.

    Returns:
        `[B, N]` int64. Ties go to the lowest index. Cost: O(N most D), in chunks.
    """
    rows, n, _ = x.shape
    own = torch.arange(n, device=x.device).expand(rows, n)
    if most == 0:
        return own
    at, valid = topk_indices(target.float(), most, target)
    x = unit(x.float().masked_fill(~(rest | target)[..., None], 0))
    columns, column_group = take(x, at).transpose(1, 2), group.gather(1, at)
    chunk = max(1, ELEMENTS // max(1, rows * most))
    found = []
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        apart = ~valid[:, None] | (group[:, part, None] != column_group[:, None])
        with torch.autocast(x.device.type, enabled=False):
            cosine = x[:, part] @ columns
        found.append(at.gather(1, cosine.masked_fill(apart, -torch.inf).argmax(-1)))
    has_target = group_sum(target, group) > 0
    return torch.where(rest & has_target, torch.cat(found, 1), own)
