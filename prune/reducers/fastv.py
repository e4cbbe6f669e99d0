"""FastV: keep what the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prune.errors import ConfigError
from prune.method import Scorer
from prune.registry import register
from prune.tokens import VisualTokens


@register
@dataclass
class FastV(Scorer):
    """After `layer` decoder layers, keep the visual tokens the last prompt token attends to most.

    Based on "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models" (arXiv 2403.06764). The score is the softmax attention of layer `layer - 1`, mean over
    heads, in the row of the last token, as in the authors' code (some read the paper as averaging over all rows).

    Where we differ from the authors' code:
        - every row of a batch is ranked by its own attention, not by that of row 0, and padding is honoured;
        - every image has a budget of its own; the code knows one image at a fixed place;
        - only the one attention row is computed, so SDPA and FlashAttention stay in use.

    Cost: O(N) beside the signal `last_token_attention`.

    Args:
        layer: the first decoder layer that sees the kept tokens only; the paper's 2 (its demo uses 3).

    Raises:
        ConfigError: `layer` is no whole number >= 1: there is no attention before layer 0.
    """

    layer: int = 2

    name = "fastv"
    title = (
        "An Image is Worth 1/2 Tokens After Layer 2: "
        "Plug-and-Play Inference Acceleration for Large Vision-Language Models"
    )
    arxiv = "2403.06764"
    signals = ("last_token_attention",)
    needs_question = True

    def __post_init__(self):
        if self.layer < 1:
            raise ConfigError(
                f"layer={self.layer!r} must be a whole number >= 1: attention comes from the layer before"
            )

    @property
    def site(self) -> str:
        return f"decoder:{self.layer}"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.last_token_attention.float()
