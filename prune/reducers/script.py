"""Script: tokens that are not redundant in a graph and that a DPP picks for the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.dpp import dpp_map
from prune.kernels.graph import bipartite
from prune.kernels.quota import quota_topk
from prune.method import Reducer
from prune.reducers.cdpruner import crops, text_relevance
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens


@register
@dataclass
class Script(Reducer):
    """After the projector, keep what a redundancy graph and a question-conditioned DPP agree on.

    Based on "Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language
    Models" (arXiv 2512.01949). Graph: tokens at even places against those at odd ones, an edge where the cosine is
    `threshold` or more; redundancy is the number of edges times exp(`gain` * (their mean cosine - `threshold`)), mixed
    half and half with the mean cosine to the other side where a token has fewer than `few` edges. DPP: as in CDPruner.
    Both name twice the count, the graph its least redundant tokens; kept are those of the DPP's, in its order, that the
    graph names too, then the rest of the DPP's. Each tile has its share.

    This is the paper's idea, pieced together from reviews of it; no golden data. Ours are: tokens on both sides are
    rated, "twice the count", and what fills up an intersection that is too small.

    Where we differ from the authors' code:
        - the graph has a say: in the code the intersection is filled up from exactly k DPP picks, which returns these;
        - least redundant tokens are kept, as the paper has it; the code keeps the most connected ones;
        - even against odd places, as the paper has it; the code compares all pairs;
        - the greedy DPP is the exact one; the code computes it, drops it, and picks without orthogonalisation;
        - relevance is that of `CDPruner` here, with its sign and scale, from the language model's own embeddings.

    Cost: O(N^2 D / 4) for the graph, in chunks, then O(k N (D + k)) in 2 k steps. Signals: what enters
    the language model.

    Args:
        threshold: cosine of an edge, in [-1, 1].
        few: tokens with fewer edges than this are rated by their mean cosine too; at least 0.
        gain: of the mean cosine of the edges.
        negate: least similar to the text is most relevant, as for CLIP's own embeddings.

    Raises:
        ConfigError: an option is out of range.
    """

    threshold: float = 0.2
    few: int = 4
    gain: float = 1.0
    negate: bool = False

    name = "script"
    title = "Script: Graph-Structured and Query-Conditioned Semantic Token Pruning for Multimodal Large Language Models"
    arxiv = "2512.01949"
    signals = ("inputs",)
    tower = {"features": Tower("features")}  # costs nothing, and with it `tokens.tile` is known on anyres models
    needs_question = True
    positions = "compact"

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold!r} must be a cosine, in [-1, 1]")
        if self.few < 0:
            raise ConfigError(f"few={self.few!r} must be a whole number >= 0")

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        tile, mask = crops(tokens), tokens.mask
        twice = [min(2 * count, mask.shape[1]) for count in keep]
        redundant = redundancy(tokens.features, tile, mask, self.threshold, self.few, self.gain)
        order, valid = dpp_map(tokens.features, text_relevance(tokens, self.negate), twice, mask, tile)
        named = _at(*quota_topk(-redundant, tile, twice, mask), torch.zeros_like(tile), 1)
        number = torch.arange(1, order.shape[1] + 1, device=tile.device).expand_as(order)
        late = _at(order, valid, torch.full_like(tile, 3 * order.shape[1]), number) - order.shape[1] * named
        return Reduction(*quota_topk(-late, tile, keep, mask))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        n = geometry.visual_tokens
        return 2 * (n // 2) * (n - n // 2) * geometry.hidden_size


def redundancy(features: Tensor, tile: Tensor, mask: Tensor, threshold: float, few: int, gain: float) -> Tensor:
    """`[B, N]` fp32: how much of every token other tokens of its tile show already; see `Script`."""
    edges, near, mean = bipartite(features, tile, mask, threshold)
    rated = edges * (gain * (near - threshold)).exp()
    return torch.where(edges < few, (rated + mean) / 2, rated)


def _at(index: Tensor, valid: Tensor, out: Tensor, value: Tensor | int) -> Tensor:
    """`out` `[B, N]` with `value` at the valid ones of `index` `[B, K]`."""
    spare = out[:, :1]  # where padding writes to
    slot = index.masked_fill(~valid, out.shape[1])
    return torch.cat([out, spare], 1).scatter(1, slot, value)[:, :-1]
