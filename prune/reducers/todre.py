"""ToDRE: a diverse subset before the decoder, and no visual token at all after a late layer that has lost interest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Budget, Geometry
from prune.errors import ConfigError
from prune.kernels import row_attention
from prune.kernels.depth import scale_layers
from prune.kernels.greedy import spread
from prune.kernels.topk import host_counts, to_device
from prune.method import Method, Reducer, Site, Stage
from prune.reducers.random import random_scores
from prune.registry import register
from prune.tokens import AttentionInputs, Reduction, Tower, VisualTokens

ELEMENTS = 1 << 26
"""Attention weights held at a time."""


@register
@dataclass
class ToDRE(Method):
    """After the projector, keep a diverse subset; after 7/8 of the decoder, drop all of it if the text no longer looks.

    Based on "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757v2). The
    subset starts with the token CLS attends to most (in the whole-image view, if there are crops) and grows by the
    token with the smallest sum of cosines to those it has. At one late layer, the attention of the text after an image
    is averaged over heads; if less than the share `tau` of it goes to the image's tokens, all of them go before the
    next layer.

    The budget is what the first stage keeps; it does not count on the second one, which is all or nothing. With
    `ratio=0` neither acts.

    Where we differ from the paper (there is no code):
        - attention from image to text is not looked at: the text that counts comes later, which makes it exactly 0;
        - every image of a prompt is judged by itself, and one without text after it stays;
        - positions are not renumbered, because the second stage acts in the decoder;
        - `selector="kcenter"` is the rule the first version is named after, farthest from the nearest;
        - without CLS the pivot is a random token, as in the paper, but a fixed one.

    Cost: O(K N D) for the first stage; O(T L H d) for T text tokens of L columns for the second. Signals: attention of
    one layer; CLS attention of the vision encoder's last layer.

    Args:
        selector: "maxsum" or "kcenter".
        pivot: "cls", or "random" for vision encoders without CLS.
        seed: of the random pivot.
        layer: the first decoder layer without visual tokens; None is the one after 7/8 (29 of 32).
        tau: share of attention below which they go, in [0, 1] (0.1 in the paper); 0 leaves the second stage out.

    Raises:
        ConfigError: an option is out of range.
    """

    selector: str = "maxsum"
    pivot: str = "cls"
    seed: int = 0
    layer: int | None = None
    tau: float = 0.1

    name = "todre"
    title = "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance"
    arxiv = "2505.18757"
    signals = ("attention",)
    adaptive = True

    def __post_init__(self):
        if self.selector not in ("maxsum", "kcenter"):
            raise ConfigError(f"selector={self.selector!r} must be 'maxsum' or 'kcenter'")
        if self.pivot not in ("cls", "random"):
            raise ConfigError(f"pivot={self.pivot!r} must be 'cls' or 'random'")
        if self.layer is not None and self.layer < 1:
            raise ConfigError(f"layer={self.layer!r} must be None or a whole number >= 1")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a number in [0, 1]")

    @property
    def tower(self) -> dict[str, Tower]:
        return Diverse(self.selector, self.pivot, self.seed).tower

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        first = Stage(Site.parse("projected"), Diverse(self.selector, self.pivot, self.seed), keep)
        late = scale_layers((29,), 32, geometry.layers) if self.layer is None else (self.layer,)
        if not self.tau or not late:
            return (first,)
        # 0 says that the stage may drop all, not that it will; see `stages`.
        least = keep if keep == geometry.visual_tokens else 0
        return first, Stage(Site.parse(f"decoder:{late[0]}"), DropUnseen(self.tau), least)

    def stages(self, geometry: Geometry, budget: Budget) -> tuple[Stage, ...]:
        return self.plan(geometry, budget.solve(geometry, lambda keep: [keep] * geometry.layers))

    def kept(self, n_visual: int, budget: Budget, geometry: Geometry | None = None) -> int:
        """At most how many tokens are left: those of the first stage."""
        return Diverse().kept(n_visual, budget, geometry)


@dataclass
class Diverse(Reducer):
    """The first stage; see `ToDRE`."""

    selector: str = "maxsum"
    pivot: str = "cls"
    seed: int = 0

    name = "todre"

    @property
    def tower(self) -> dict[str, Tower]:
        return {"attention": Tower("cls_attention", -1)} if self.pivot == "cls" else {}

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        if self.pivot == "cls":
            score = tokens.tower["attention"].float()
            if tokens.coordinates is not None:
                score = score + 2 * (tokens.coordinates[..., 0] == 0)  # attention is at most 1
        else:
            score = random_scores(tokens.features, self.seed)
        first = score.nan_to_num(-1.0).masked_fill(~tokens.mask, -2.0).argmax(1, keepdim=True)
        order, valid = diverse(tokens.features, first, keep, tokens.mask, self.selector)
        ascending = order.masked_fill(~valid, tokens.features.shape[1]).sort(dim=1).values
        return Reduction(ascending.masked_fill(~valid, 0), valid)


@dataclass
class DropUnseen(Reducer):
    """The second stage; see `ToDRE`. Keeps all of an image or none of it; all where `keep` allows all."""

    tau: float = 0.1

    name = "todre"
    signals = ("attention",)
    adaptive = True

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        mask = tokens.mask
        seen = image_attention(tokens.attention, mask)
        bound = to_device(host_counts(keep, len(mask)), mask.device) < mask.sum(1)
        drop = (seen < self.tau) & tokens.attention.text_mask.any(1) & bound
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return Reduction(index, mask & ~drop[:, None])

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        columns = geometry.visual_tokens + geometry.text_tokens
        return 2 * geometry.text_tokens * columns * geometry.heads * geometry.head_dim


@torch.no_grad()
def diverse(
    x: Tensor, first: Tensor, keep: Sequence[int], mask: Tensor, selector: str = "maxsum"
) -> tuple[Tensor, Tensor]:
    """Greedy picks of every row, in order, starting from one.

    Args:
        x: `[B, N, D]`; cosines in fp32.
        first: `[B, 1]` int64.
        keep: per row, on the host.
        mask: `[B, N]` bool, the candidates.
        selector: "maxsum" picks the smallest sum of cosines to the picks, "kcenter" the smallest largest one.

    Returns:
        `order` `[B, K]` int64 and `valid` `[B, K]` bool. Ties go to the lowest index. Cost: O(K N D).
    """
    return spread(x, first, keep, mask, "sum" if selector == "maxsum" else "nearest")


@torch.no_grad()
def image_attention(attention: AttentionInputs, mask: Tensor) -> Tensor:
    """`[B]` fp32: the share of the attention of the text after an image that goes to the image's tokens.

    Mean over heads and over the text tokens; 0 where there are none. O(T L H d), in chunks of text rows.

    Args:
        mask: `[B, N]` bool, the tokens of `attention.slots`.
    """
    a, length = attention, attention.valid.shape[1]
    keys, valid = a.keys[a.sample], a.valid[a.sample]
    flags = torch.zeros(len(mask), length + 1, device=mask.device)  # the last column is a bin
    image = flags.scatter(1, a.slots.masked_fill(~mask, length), 1.0)[:, :length]
    column, total = torch.arange(length, device=mask.device), torch.zeros(len(mask), device=mask.device)
    size = max(1, ELEMENTS // max(1, len(mask) * a.queries.shape[2] * length))
    for rows, real in zip(a.text_slots.split(size, 1), a.text_mask.split(size, 1)):
        seen = valid[:, None] & (column <= rows[..., None])
        weights = row_attention(a.queries[a.sample[:, None], rows], keys, a.scale, seen).mean(1)
        total += ((weights * image[:, None]).sum(-1) * real).sum(1)
    return total / a.text_mask.sum(1).clamp(min=1)
