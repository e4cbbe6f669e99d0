"""FrameFusion: merge what stays the same from frame to frame, then prune once by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.similarity import dot, unit
from prune.kernels.tiles import tile_groups
from prune.kernels.topk import topk_mask
from prune.method import Method, Reducer, Scorer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens


@register
@dataclass
class FrameFusion(Method):
    """Merge a video's patches that resemble the same patch of the frame before, then prune as FastV does.

    Based on "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language
    Models" (arXiv 2501.01986). A patch whose cosine with its predecessor (the same place in the frame before, or the
    last one that is left) reaches `similarity` is merged: every run of such patches becomes the mean of the run and the
    patch before it. This happens before the decoder and in front of its first layers; in front of layer `merges_before`
    what the last prompt token attends to most is kept.

    Merging stops at the share of tokens the budget leaves in the end, taking the most similar first. So the final count
    is the budget's; fewer only where images of different sizes share one absolute `keep`. What is merged in between
    depends on the content: budgets by `average` and `flops` count it as nothing and are upper bounds.

    Where we differ from the authors' code:
        - the budget is a count; the code's is a mean over 28 layers, whatever the model has, from which it computes the
          last cut when merging is over;
        - merging happens at fixed places, at input of layers; the code merges between attention and MLP of every layer
          until less than a tenth is merged, then prunes in the layer after;
        - every merging stage takes one token at least, for the engine skips stages that leave all; in a still image,
          where nothing can merge, it is dropped;
        - batches, several videos and images per prompt work; separators are not counted and not merged.

    Cost: O(N D) per merge, O(N) for the cut. Signals: last token's attention.

    Args:
        similarity: cosine from which patches merge, in [-1, 1]; the paper's depends on the model.
        merges_before: how many times tokens merge, at least 1: before the decoder and in front of its layers 1, 2, ...;
            the cut is in front of the layer with this number.

    Raises:
        ConfigError: an option is out of range.
    """

    similarity: float = 0.6
    merges_before: int = 2

    name = "framefusion"
    title = "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language Models"
    arxiv = "2501.01986"
    signals = ("last_token_attention",)
    needs_question = True
    merges = True
    adaptive = True

    def __post_init__(self):
        if not -1 <= self.similarity <= 1:
            raise ConfigError(f"similarity={self.similarity!r} must be in [-1, 1]: a cosine")
        if not 1 <= self.merges_before < 1000:
            raise ConfigError(f"merges_before={self.merges_before!r} must be a whole number >= 1, and less than 1000")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        n = geometry.visual_tokens
        fusing = Fusing(self.similarity, keep / n)
        sites = ["projected", *(f"decoder:{layer}" for layer in range(1, self.merges_before + 1))]
        return (
            *(Stage(Site.parse(site), fusing, max(keep, n - done)) for done, site in enumerate(sites[:-1], 1)),
            Stage(Site.parse(sites[-1]), Attended(), keep),
        )


@dataclass
class Fusing(Reducer):
    """FrameFusion's merging; see `FrameFusion`.

    Args:
        similarity: cosine from which patches merge.
        least: share of the image's tokens, as they were before all stages, below which merging stops.
    """

    similarity: float = 0.6
    least: float = 0.0

    name = "framefusion"
    merges = True
    adaptive = True

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        if (before := tokens.memory.get("framefusion")) is None:
            before = tokens.memory["framefusion"] = tokens.mask.sum(1)
        least = (before.double() * self.least).round().long()
        return fuse(tokens, keep, self.similarity, least)


@dataclass
class Attended(Scorer):
    """FrameFusion's cut; see `FrameFusion`."""

    name = "framefusion"
    signals = ("last_token_attention",)
    needs_question = True
    adaptive = True

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.last_token_attention.float()


@torch.no_grad()
def fuse(tokens: VisualTokens, keep: Sequence[int], similarity: float, least: Tensor) -> Reduction:
    """Merge runs of similar patches into the patch before them.

    Args:
        keep: at most so many tokens are left of each row.
        similarity: cosine from which patches merge.
        least: `[B]` int64; merging by similarity stops at so many tokens.
    """
    mask, n = tokens.mask, tokens.mask.shape[1]
    number = mask.sum(1)
    tile, row, column = (tokens.coordinates[..., i].clamp(min=0) for i in (0, 2, 3))
    placed = mask & (tokens.coordinates[..., 2] >= 0)
    group = tile_groups((tile << 32) + (row << 16) + column, placed)
    order = group.sort(dim=1, stable=True).indices  # patch by patch, frames in order
    group, placed = group.gather(1, order), placed.gather(1, order)
    x = unit(tokens.features.masked_fill(~mask[..., None], 0).gather(1, order[..., None].expand_as(tokens.features)))
    cosine = torch.full(mask.shape, -2.0, device=mask.device)  # the first frame of a patch resembles nothing
    follows = placed[:, 1:] & placed[:, :-1] & (group[:, 1:] == group[:, :-1])
    cosine[:, 1:] = torch.where(follows, dot(x[:, 1:], x[:, :-1]), -2.0)
    similar = torch.minimum((cosine >= similarity).sum(1), (number - least).clamp(min=0))
    limit = torch.minimum(torch.tensor(list(keep)).to(number.device, non_blocking=True), number)
    by_token = torch.empty_like(cosine).scatter_(1, order, cosine)
    merged = topk_mask(by_token, torch.maximum(similar, number - limit), mask)
    chosen = mask & ~merged
    run = merged.gather(1, order)
    position = torch.arange(n, device=mask.device).expand_as(order)
    anchor = torch.where(run, -1, position).cummax(1).values.clamp(min=0)
    joins = run & (group.gather(1, anchor) == group) & chosen.gather(1, order.gather(1, anchor))
    size = torch.ones_like(cosine).scatter_add_(1, anchor, joins.float())
    weight = joins / size.gather(1, anchor)
    source, slot, weight = folds(chosen, order, order.gather(1, anchor), weight)
    index, valid = chosen_indices(chosen, max(keep, default=0))
    size = torch.empty_like(size).scatter_(1, order, size)
    return Reduction(index, valid, Merge(source, slot, weight, 1 / size.gather(1, index)))
