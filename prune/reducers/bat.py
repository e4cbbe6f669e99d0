"""BAT, as we read it: cluster what CLS ignores, pair what it attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune.blocks import patch_sizes, summary_attention
from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.bipartite import bipartite_merge
from prune.kernels.cluster import density_peaks
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.topk import host_counts, to_device, topk_mask
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import Merge, Reduction, VisualTokens


@register
@dataclass
class BAT(Reducer):
    """In three blocks, fuse clusters of the patches CLS ignores, and the most similar of those it attends to.

    After "Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision Transformers"
    (arXiv 2211.11315). OUR OWN READING: no reference code exists - the authors released a description, figures and
    training logs - so no number of theirs can be expected of it. Theirs is trained with the reduction in place.

    Known, and done: between attention and MLP of the blocks 4, 7 and 10 of 12, CLS attention splits the patches into
    attentive and inattentive ones; the inattentive are clustered around density peaks and every cluster is fused; the
    most similar attentive ones are fused in pairs. Their logs fit equal shares per block, as here: of N patches
    N (K/N)^(i/3) are left after the i-th cut.

    Our choices, where nothing is known:
        - of the K tokens a cut leaves, `clusters` are clusters and `pairs` are fused pairs, the rest attentive patches:
          the (1 - clusters + pairs) K patches with the highest attention of CLS are attentive, mean over heads; without
          CLS, with the highest attention of the mean query;
        - peaks are those of DPC-KNN (`kernels.density_peaks`): the density exp(-sum of squared distances to all),
          as printed elsewhere, is 0 in fp32. Distances are between features;
        - pairs are found by one round of ToMe's matching of features, by cosine; several may share a partner;
        - groups are fused by a mean weighted with the attention of CLS;
        - tokens stay in the order of the image, a cluster at its centre, a pair at its second partner; sizes add up.

    Cost per cut: O(N^2 D). Signals: block.

    Args:
        layers: the three blocks, ascending, at least 1; None: 3, 6 and 9 (from 0) of 12, or as deep elsewhere.
        clusters: share of the tokens left that are clusters, in (0, 1]; at least one is.
        pairs: share of the tokens left that are fused pairs of attentive patches, in [0, 1].

    Raises:
        ConfigError: an option is out of range.
    """

    layers: tuple[int, ...] | None = None
    clusters: float = 0.2
    pairs: float = 0.1

    name = "bat"
    title = (
        "Beyond Attentive Tokens: Incorporating Token Importance and Diversity (own reading; no reference code exists)"
    )
    arxiv = "2211.11315"
    signals = ("block",)
    merges = True
    place = "inside"

    def __post_init__(self):
        if self.layers is not None:
            if not ascending(self.layers):
                raise ConfigError(f"layers={self.layers} must be ascending whole numbers >= 1, such as (3, 6, 9)")
        if not 0 < self.clusters <= 1:
            raise ConfigError(f"clusters={self.clusters!r} must be in (0, 1]: the share of tokens that are clusters")
        if not 0 <= self.pairs <= 1:
            raise ConfigError(f"pairs={self.pairs!r} must be in [0, 1]: the share of tokens that are fused pairs")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        layers = self.layers or scale_layers((3, 6, 9), 12, geometry.blocks) or (0,)
        n = geometry.visual_tokens
        counts = [max(keep, round(n * (keep / n) ** (i / len(layers)))) for i in range(1, len(layers))] + [keep]
        return tuple(Stage(Site.parse(f"block:{layer}"), self, count) for layer, count in zip(layers, counts))

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return bat(tokens, keep, self.clusters, self.pairs)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n, width = geometry.visual_tokens, geometry.heads * geometry.head_dim
        return 2 * (n + geometry.text_tokens) * width + 2 * n * (n + max(1, n // 2)) * geometry.hidden_size


@torch.no_grad()
def bat(tokens: VisualTokens, keep: Sequence[int], clusters: float, pairs: float) -> Reduction:
    """See `BAT`."""
    mask, device = tokens.mask, tokens.mask.device
    counts = host_counts(keep, len(mask))
    few = [min(k, max(1, round(clusters * k))) for k in counts]
    most = [min(k - c, round(pairs * k)) for k, c in zip(counts, few)]
    kept, centres, fused = (to_device(x, device) for x in (counts, few, most))
    fused = fused.minimum(mask.sum(1) - kept)

    importance = summary_attention(tokens.block, mask)
    attentive = topk_mask(importance, kept - centres + fused, mask)
    centre = density_peaks(tokens.features, centres, mask & ~attentive)
    one = torch.zeros_like(centre)
    pairing = bipartite_merge(tokens.features, one, (kept - centres).clamp(min=1)[:, None] + one, attentive, rounds=1)
    place = torch.arange(mask.shape[1], device=device).expand_as(mask)
    into = torch.where(attentive, pairing.into, centre)
    chosen = mask & (into == place)

    weight = importance.clamp(min=1e-12).masked_fill(~mask, 0)
    total = torch.zeros_like(weight).scatter_add_(1, into, weight)
    share = (weight / total.gather(1, into).clamp(min=1e-30)).masked_fill(chosen | ~mask, 0)
    source, slot, share = folds(chosen, place, into, share)
    index, valid = chosen_indices(chosen, max(counts, default=0))
    sizes = patch_sizes(tokens.sizes, mask).masked_fill(~mask, 0)
    sizes = torch.zeros_like(sizes).scatter_add_(1, into, sizes).gather(1, index).masked_fill(~valid, 1)
    scale = (weight / total.clamp(min=1e-30)).gather(1, index).masked_fill(~valid, 1)
    return Reduction(index, valid, Merge(source, slot, share, scale), sizes)
