"""AIM: merge similar tokens before the decoder, then prune inside by the PageRank of its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.attention import HELD, attention_pagerank
from prune.kernels.bipartite import bipartite_merge
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.tiles import group_rank, tile_groups, tile_shares
from prune.method import Method, Reducer, Scorer, Site, Stage
from prune.registry import register
from prune.tokens import AttentionInputs, Merge, Reduction, Tower, VisualTokens


@register
@dataclass
class AIM(Method):
    """Merge similar tokens of every tile or frame before the decoder, then drop tokens bit by bit inside it.

    Based on "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (arXiv 2412.03248). Merging:
    rounds of bipartite matching that halve each frame, until `merge` of the tokens is left. Pruning: the tokens of a
    layer are ranked by five steps of PageRank along its causal attention at temperature 0.1, root mean square over
    heads; in front of each of `layers` an equal number goes, the lowest ranked.

    The paper's schedule ends with no visual token after 22 of 28 layers; here the last cut leaves the budget's count,
    at least 1. With a final count of 1 and `merge` 0.25 it is the released video setting but for that token: 49 of 196
    tokens per frame, then 7/8, 6/8, ... of them. A count that `merge` does not reach is met by merging alone.

    Where the authors' code and we differ (we had no full text of the paper):
        - dropped tokens leave the sequence; the code masks them, and their rows go on voting in the PageRank.
          `compat=True` lets columns that are not valid vote (padding, for in our sequences there are no others);
        - counts are per image; the code's are those of the longest sequence and of row 0's text;
        - tokens stay in the order of the image between rounds of merging, so that those compared are neighbours; the
          code puts the unmerged first, by similarity: `compat=True`;
        - images are merged as videos are; the code merges videos only, and LLaVA-1.5's images in the encoder, by the
          keys of its last layer: `metric="keys"`;
        - several images per prompt work; the code asserts one.

    Cost: merging O(rounds N^2 D) in chunks; pruning O((N + T)^2 H d) per cut, and `iterations` times that beyond 4096
    columns, in chunks. Signals: attention; keys of the encoder for `metric="keys"`.

    Args:
        merge: share of the tokens left by merging, in (0, 1]; 0.25 for videos, 0.125 for LLaVA-1.5's images.
        layers: the decoder layers in front of which tokens are dropped, ascending, at least 1. None: the paper's eight,
            15 to 22 of 28, or as deep elsewhere.
        metric: what is compared: "features" as they enter the decoder, or "keys" of the encoder's last layer; then its
            features are merged, in front of the projector.
        iterations: steps of the PageRank, at least 1.
        temperature: of its softmax, above 0.
        compat: the authors' order and votes.

    Raises:
        ConfigError: an option is out of range.
    """

    merge: float = 0.25
    layers: tuple[int, ...] | None = None
    metric: str = "features"
    iterations: int = 5
    temperature: float = 0.1
    compat: bool = False

    name = "aim"
    title = "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning"
    arxiv = "2412.03248"
    signals = ("attention",)
    merges = True

    def __post_init__(self):
        if not 0 < self.merge <= 1:
            raise ConfigError(f"merge={self.merge!r} must be in (0, 1]: the share of the tokens left by merging")
        if self.layers is not None:
            if not ascending(self.layers):
                raise ConfigError(f"layers={self.layers} must be ascending whole numbers >= 1, such as range(15, 23)")
        if self.metric not in ("features", "keys"):
            raise ConfigError(f"metric={self.metric!r} must be 'features' or 'keys'")
        if self.iterations < 1:
            raise ConfigError(f"iterations={self.iterations!r} must be a whole number >= 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} must be above 0")

    @property
    def tower(self) -> dict[str, Tower]:
        return Merging(self.metric).tower

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        merged = max(keep, round(geometry.visual_tokens * self.merge))
        layers = self.layers or scale_layers(range(15, 23), 28, geometry.layers)
        ranking = Ranking(self.iterations, self.temperature, self.compat)
        left = [keep + (merged - keep) * (len(layers) - done) // len(layers) for done in range(1, len(layers) + 1)]
        return (
            Stage(Site.parse("projected"), Merging(self.metric, self.compat), merged),
            *(Stage(Site.parse(f"decoder:{layer}"), ranking, count) for layer, count in zip(layers, left)),
        )


@dataclass
class Merging(Reducer):
    """AIM's stage before the decoder; see `AIM`."""

    metric: str = "features"
    compat: bool = False

    name = "aim"
    merges = True

    @property
    def tower(self) -> dict[str, Tower]:
        return {"metric": Tower("keys", -1)} if self.metric == "keys" else {}

    @property
    def needs_projector(self) -> bool:
        return self.metric == "keys"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        metric = tokens.tower["metric"].flatten(2) if self.metric == "keys" else tokens.features
        group = tile_groups(tokens.tile, tokens.mask)
        share = tile_shares(keep, group, tokens.mask)
        rounds = halvings(tokens.mask.shape[1], min(keep, default=1))
        merged = bipartite_merge(metric, group, share.clamp(min=1), tokens.mask, rounds, self.compat)
        position = torch.arange(share.shape[1], device=share.device).expand_as(share)
        chosen = merged.alive & (group_rank(-position, group, merged.alive) < share)  # a tile without a share goes
        index, valid = chosen_indices(chosen, max(keep, default=0))
        others = merged.weight.masked_fill(chosen | ~tokens.mask, 0)
        source, slot, weight = folds(chosen, position, merged.into, others)
        space = "tower" if self.metric == "keys" else "here"
        return Reduction(index, valid, Merge(source, slot, weight, merged.weight.gather(1, index), space))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n = geometry.visual_tokens
        return halvings(n, keep) * 2 * n * max(1, n // 2) * geometry.hidden_size  # as wide as the features


@dataclass
class Ranking(Scorer):
    """AIM's stages inside the decoder; see `AIM`."""

    iterations: int = 5
    temperature: float = 0.1
    compat: bool = False

    name = "aim"
    signals = ("attention",)

    def score(self, tokens: VisualTokens) -> Tensor:
        rank = pagerank(tokens.attention, self.iterations, self.temperature, self.compat)
        return rank[tokens.attention.sample].gather(1, tokens.attention.slots)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        weights = geometry.heads * (geometry.visual_tokens + geometry.text_tokens) ** 2
        times = 1 if weights <= geometry.heads * HELD else self.iterations  # that they are made
        return 2 * weights * (times * geometry.head_dim + self.iterations)


def halvings(n: int, keep: int) -> int:
    """Rounds that surely bring every tile of an image of `n` tokens to its share of `keep`, with one for rounding."""
    return (-(-n // max(1, keep)) - 1).bit_length() + 1


@torch.no_grad()
def pagerank(inputs: AttentionInputs, iterations: int, temperature: float, compat: bool) -> Tensor:
    """`[S, L]` fp32, of all columns of the sequences."""
    given = dict(iterations=iterations, temperature=temperature)
    if compat:  # every column votes, valid ones are voted for
        length = inputs.valid.shape[1]
        given["mask"] = inputs.valid[:, None].expand(-1, length, -1)
    else:
        given["valid"] = inputs.valid
    return attention_pagerank(inputs.queries, inputs.keys, inputs.scale, **given)
