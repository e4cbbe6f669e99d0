"""DivPrune: the most diverse subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune.budget import Geometry
from prune.kernels import farthest_point
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class DivPrune(Reducer):
    """After the projector, keep the subset whose smallest pairwise cosine distance is largest, found greedily.

    Based on "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175). The first
    pick is the token whose nearest neighbour is farthest, every next one the token farthest from the picks so far.

    Where we differ from the authors' code:
        - a picked token is excluded explicitly: with duplicates in the image the code can return a token twice;
        - distances are in fp32: in half precision about a third of the choice is rounding noise;
        - zero vectors have cosine 0 to everything, not NaN;
        - every image of a batch is reduced by itself; the code handles image 0 of row 0;
        - a running minimum replaces the distances of all picks gathered anew at every step: same picks.

    Cost: O(N^2 D) for the first pick, in chunks, then O(k N D). No signals.

    Args:
        newlines: count separators inside the image (`image_newline`) as visual tokens, as the code does for LLaVA-NeXT.
    """

    newlines: bool = False

    name = "divprune"
    title = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models"
    arxiv = "2503.02175"
    positions = "compact"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        order, valid = farthest_point(tokens.features, keep, tokens.mask)
        ascending = order.masked_fill(~valid, tokens.features.shape[1]).sort(dim=1).values
        return Reduction(ascending.masked_fill(~valid, 0), valid)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        return 2 * geometry.visual_tokens**2 * geometry.hidden_size  # all pairs, for the first pick
