"""SparseVLM: the words that speak of the image rate its tokens; the best of the rest are recycled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels import topk_indices, topk_mask
from prune.kernels.cluster import density_peaks
from prune.kernels.compaction import take
from prune.kernels.depth import scale_layers
from prune.kernels.heads import head_attention
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens

LAYERS, OF = (2, 6, 15), 32
"""The layers whose attention the paper reads, and the number of layers of its decoder."""
PRESETS = {
    "1.0": ((82, 32, 18), (249, 55, 27), (312, 117, 39), (309, 204, 113)),
    "2.0": ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)),
}
"""Of 576 tokens, how many the code leaves after its three cuts: its budgets "64", "96", "128" and "192"."""
RATERS = "sparsevlm_raters"


@register
@dataclass
class SparseVLM(Reducer):
    """After three layers, keep the visual tokens that the image-related words attend to, and recycle some of the rest.

    Based on "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417).
    Raters are the text tokens after the image whose share in the softmax over text of (visual input . text input), mean
    over visual tokens, is above average. A visual token's score is the attention it gets from the raters, mean over
    them and the heads. Version 1.0 takes the best 30 % of what it drops, clusters them by density peaks, about ten to
    a cluster, and keeps the cluster means. Version 2.0 (SparseVLM+) does not recycle; it divides attention by what
    rotary embedding alone makes of the distance and uses the `heads` heads that look at the image most.

    Counts follow the authors' tables: 18, 27, 39 or 113 of 576 tokens left in the end are their "64", "96", "128" and
    "192" (20, 28, 60, 118 in version 2.0), other counts lie on straight lines between these. Recycled tokens count.

    Where we differ from the authors' code:
        - a recycled token stands at the place, and position id, of its cluster's centre, so counts and order are those
          of the image; the code appends it behind the kept ones and renumbers (version 1.0);
        - of equally dense points the first is denser; the code adds noise, which decides where there are two clusters;
        - the mean of a cluster is the mean: the code divides by its size + 1e-6;
        - if no text token is above average (a single one, equal ones), all are raters; the code fails;
        - rotary weights have a floor of 1/16 of the largest: the code's cross 0 at a distance of 1707 tokens;
        - any count, batch, padding and number of images; attention rows of the text only, no T x T map.

    Cost: O(T (N + T) H d) for T text tokens and O(M^2 D) to cluster M = 0.3 of the dropped ones, per stage; O(N T D)
    once. Signals: attention, what enters the language model.

    Args:
        version: "1.0" or "2.0".
        layers: three layers after which the cuts are, ascending; None: 2, 6, 15 of 32 (counted from 0) at any depth.
        heads: how many heads version 2.0 uses, if there are as many; the code's 14 of 32.
        rope_theta: base of the rotary embedding, for version 2.0.

    Raises:
        ConfigError: an option is out of range.
    """

    version: str | float = "1.0"
    layers: tuple[int, ...] | None = None
    heads: int = 14
    rope_theta: float = 10000.0
    first: bool = field(default=True, init=False, repr=False, compare=False)  # the stage that looks for raters

    name = "sparsevlm"
    title = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference"
    arxiv = "2410.04417"
    signals = ("attention", "inputs")
    needs_question = True
    merges = True

    def __post_init__(self):
        self.version = str(self.version)
        if self.version not in PRESETS:
            raise ConfigError(f"version={self.version!r} must be '1.0' or '2.0'")
        if self.layers is not None:
            if len(self.layers) != 3 or not -1 < self.layers[0] < self.layers[1] < self.layers[2]:
                raise ConfigError(
                    f"layers={self.layers} must be three ascending whole numbers >= 0, such as (2, 6, 15)"
                )
        if self.heads < 1:
            raise ConfigError(f"heads={self.heads!r} must be a whole number >= 1")
        if not self.rope_theta > 1:
            raise ConfigError(f"rope_theta={self.rope_theta!r} must be > 1")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        after = [layer + 1 for layer in self.layers or LAYERS]
        sites = after if self.layers else scale_layers(after, OF, geometry.layers)
        later = copy(self)
        later.first = False
        counts = stage_counts(PRESETS[self.version], geometry.visual_tokens, keep)[-len(sites) :]
        return tuple(
            Stage(Site.parse(f"decoder:{site}"), later if i else self, count)
            for i, (site, count) in enumerate(zip(sites, counts))
        )

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        raters = self._raters(tokens)
        if self.version == "2.0":
            score = corrected_score(tokens, raters, self.heads, self.rope_theta)
            return Reduction(*topk_indices(score, keep, tokens.mask))
        score = rater_attention(tokens, raters).mean(1)
        parts = self.split(tokens.mask.sum(1), torch.tensor(list(keep)).to(score.device, non_blocking=True))
        return recycle(tokens.features, score, keep, parts, tokens.mask)

    def _raters(self, tokens: VisualTokens) -> Tensor:
        """`[B, T]` bool: chosen in the first cut and remembered by their columns, as text may be padded anew."""
        if RATERS not in tokens.memory:
            raters = find_raters(tokens.inputs, tokens.mask, tokens.text_inputs, tokens.text_mask)
            tokens.memory[RATERS] = tokens.text_columns.masked_fill(~raters, -1)
        columns = tokens.memory[RATERS]
        return (tokens.text_columns[:, :, None] == columns[:, None]).any(-1) & tokens.text_mask

    @staticmethod
    def split(n: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How `keep` of `n` tokens are made: kept as they are, of the rest taken up again, and clusters of these.

        The code keeps k, takes up int(0.3 * (n - k)) + 1 and makes int(that / 10) + 1 clusters; k is the largest number
        that makes `keep` with its clusters. All `[B]` int64.
        """

        def taken(clusters: Tensor) -> Tensor:
            return (0.3 * (n - keep + clusters).double()).long() + 1

        clusters = torch.zeros_like(keep)
        for _ in range(8):  # each step leaves 3 % of what is missing
            clusters = torch.minimum(taken(clusters) // 10 + 1, keep - 1)
        clusters = clusters.masked_fill(n <= keep, 0)
        return keep - clusters, taken(clusters).masked_fill(clusters == 0, 0), clusters

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n, t = geometry.visual_tokens, geometry.text_tokens
        rows = 2 * t * (n + t) * geometry.heads * geometry.head_dim
        clustered = min(n, int(0.3 * n) + 1) if self.version == "1.0" else 0
        return rows + 2 * (n * t * self.first + clustered**2) * geometry.hidden_size


def stage_counts(presets: Sequence[Sequence[int]], n: int, keep: int, of: int = 576) -> list[int]:
    """Tokens left of `n` after every stage, the last one `keep`: between the presets' shares of `of` tokens."""
    known = [(0,) * len(presets[0]), *presets, (of,) * len(presets[0])]
    final = keep * of / n
    i = max(1, bisect_left([counts[-1] for counts in known], final))
    (low, high), counts = known[i - 1 : i + 1], [keep]
    part = (final - low[-1]) / (high[-1] - low[-1])
    for a, b in reversed(list(zip(low[:-1], high[:-1]))):
        counts.insert(0, min(n, max(counts[0], round((a + part * (b - a)) * n / of))))
    return counts


def find_raters(visual: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """`[B, T]` bool: text tokens that visual tokens `[B, N, D]` find more than averagely alike; see `SparseVLM`."""
    share = rater_scores(visual, mask, text, text_mask)
    mean = share.sum(1, keepdim=True) / text_mask.sum(1, keepdim=True).clamp(min=1)
    raters = (share > mean) & text_mask
    return torch.where(raters.any(1, keepdim=True), raters, text_mask)


def rater_scores(visual: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """`[B, T]` fp32: share of every text token in the softmax over text, mean over visual tokens."""
    with torch.autocast(visual.device.type, enabled=False):
        logits = visual.float() @ text.float().transpose(1, 2)
    share = logits.masked_fill(~text_mask[:, None], -torch.inf).softmax(-1)
    share = share.masked_fill(~(mask[..., None] & text_mask[:, None]), 0)
    return share.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def rater_attention(tokens: VisualTokens, raters: Tensor, gain: Tensor | None = None) -> Tensor:
    """`[B, H, N]` fp32: attention every visual token gets from the raters, their mean, times `gain` `[B, T, N]`."""
    at = tokens.attention
    queries, keys, valid = take(at.queries[at.sample], at.text_slots), at.keys[at.sample], at.valid[at.sample]
    return head_attention(queries, keys, at.scale, at.text_slots, raters, valid, at.slots, gain)


def corrected_score(tokens: VisualTokens, raters: Tensor, heads: int, theta: float) -> Tensor:
    """`[B, N]` fp32 of version 2.0: without the pull of rotary embedding, in the heads that see the image most."""
    distance = tokens.text_columns[:, :, None] - tokens.columns[:, None]
    seen = rater_attention(tokens, raters, 1 / rotary_weight(distance, tokens.attention.queries.shape[-1], theta))
    seen = seen.masked_fill(~tokens.mask[:, None], 0)
    best = topk_mask(seen.sum(2), heads)[..., None]
    return (seen * best).sum(1) / best.sum(1)


def rotary_weight(distance: Tensor, dim: int, theta: float) -> Tensor:
    """Scaled product of all-ones query and key `distance` apart after rotary embedding, at least 1/16 of that at 0."""
    weight = torch.zeros_like(distance, dtype=torch.float32)
    for i in range(dim // 2):
        weight += (distance.float() * theta ** (-2 * i / dim)).cos()
    return (weight * 2 / dim**0.5).clamp(min=dim**0.5 / 16)


def recycle(
    features: Tensor, score: Tensor, keep: Sequence[int], parts: tuple[Tensor, Tensor, Tensor], mask: Tensor
) -> Reduction:
    """Keep the highest-scored tokens, and means of clusters of the next ones at their centres; `parts`: see `split`."""
    n = mask.shape[1]
    width = min(n, int(0.3 * n) + 1)
    direct, candidates, clusters = parts
    chosen = topk_mask(score, direct, mask)
    again = topk_mask(score, candidates, mask & ~chosen)
    place = torch.arange(n, device=mask.device)
    source = torch.where(again, place, n).sort(1).values[:, :width]
    real = source < n
    source = source.masked_fill(~real, 0)
    centre = density_peaks(take(features, source), clusters, real)
    target = source.gather(1, centre)

    size = torch.zeros_like(score).scatter_add_(1, target, real.to(score))
    stays = chosen | (size > 0) & again
    index, valid = topk_indices(stays.float(), keep, mask)
    size = torch.where(chosen, 1, size.clamp(min=1))
    folded = real & (target != source)
    merge = Merge(
        source=source,
        slot=(stays.cumsum(1) - 1).gather(1, target).masked_fill(~folded, 0),
        weight=folded / size.gather(1, target),
        scale=1 / size.gather(1, index),
    )
    return Reduction(index, valid, merge)
