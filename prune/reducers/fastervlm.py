"""FasterVLM: the tokens CLS attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune.errors import ConfigError
from prune.kernels import topk_indices
from prune.method import Reducer
from prune.reducers.vispruner import SCORES, vispruner
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens


@register
@dataclass
class FasterVLM(Reducer):
    """Keep the tokens CLS attends to most in the layer of the vision encoder the projector reads.

    Based on "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster" (arXiv
    2412.01818v1; the later versions are VisPruner). Mean over heads. Every tile of an image gets its share.

    Where we differ from the authors' code:
        - the shares of tiles add up to the budget, and padded tiles of LLaVA-NeXT stay un-padded;
        - ties go to the lowest index; the code sorts unstably.

    Cost: O(N log N) beside the signal.

    Args:
        score: "cls", or "received" for vision encoders without CLS: the attention a token receives in the last layer.

    Raises:
        ConfigError: another `score`.
    """

    score: str = "cls"

    name = "fastervlm"
    title = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster"
    arxiv = "2412.01818"
    positions = "compact"

    def __post_init__(self):
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} must be 'cls' or 'received'")

    @property
    def tower(self) -> dict[str, Tower]:
        return {"attention": SCORES[self.score]}

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        rank, _ = vispruner(tokens.tower["attention"], None, tokens.tile, tokens.mask, keep, important_ratio=1)
        return Reduction(*topk_indices((rank < rank.shape[1]).float(), keep, tokens.mask))
