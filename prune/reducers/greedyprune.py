"""GreedyPrune: the tokens most like the question, no two of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.errors import ConfigError
from prune.kernels import dot, greedy, unit
from prune.kernels.compaction import take
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class GreedyPrune(Reducer):
    """After `layer` decoder layers, keep the visual tokens most like the last text token, without near-duplicates.

    Based on "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models" (arXiv 2506.13166).
    Among all sets without two tokens of cosine above `tau`, the one of largest total saliency, found greedily: take the
    most salient token that no taken one vetoes. Saliency is the cosine with the last text token.

    There is no code by the authors and no golden data. The paper's text was known from reviews only; ours are:
        - `layer` 2, as in FastV, with which the paper compares; it says "shallow layers";
        - `tau` 0.9, and hidden states at the layer's input as features (a port takes value states);
        - when no token is left without veto, the most salient of the rest fill up, so that the count is exact.

    Cost: O(k N D) in k steps. Signal: text after the image.

    Args:
        layer: the first decoder layer that sees the kept tokens only.
        tau: largest cosine of two kept tokens, in [-1, 1]; 1 makes it a plain top-k by saliency.

    Raises:
        ConfigError: an option is out of range.
    """

    layer: int = 2
    tau: float = 0.9

    name = "greedyprune"
    title = "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models"
    arxiv = "2506.13166"
    signals = ("text_features",)
    needs_question = True

    def __post_init__(self):
        if self.layer < 1:
            raise ConfigError(f"layer={self.layer!r} must be a whole number >= 1")
        if not -1 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a cosine, in [-1, 1]")

    @property
    def site(self) -> str:
        return f"decoder:{self.layer}"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        saliency = last_text_cosine(tokens)
        return Reduction(*greedy_veto(tokens.features, saliency, keep, tokens.mask, self.tau))


def last_text_cosine(tokens: VisualTokens) -> Tensor:
    """`[B, N]` fp32: cosine of every token with the last text token; 0 where there is no text."""
    if tokens.text_mask.shape[1] == 0:
        return torch.zeros_like(tokens.mask, dtype=torch.float32)
    place = torch.arange(tokens.text_mask.shape[1], device=tokens.text_mask.device)
    last = torch.where(tokens.text_mask, place, 0).amax(1, keepdim=True)
    text = take(tokens.text_features, last).masked_fill(~tokens.text_mask.any(1)[:, None, None], 0)
    return dot(unit(tokens.features), unit(text))


@torch.no_grad()
def greedy_veto(x: Tensor, weight: Tensor, keep: Sequence[int], mask: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Take the heaviest token, veto those alike, again and again.

    Args:
        x: `[B, N, D]` float; cosines in fp32.
        weight: `[B, N]`; ties go to the lowest index.
        keep: tokens per row, on the host.
        mask: `[B, N]` bool, the candidates.
        tau: a taken token vetoes those with a larger cosine to it. Vetoed ones fill up what is missing, heaviest first.

    Returns:
        `index` and `valid` `[B, K]`, ascending, as of `topk_indices`.
    """
    order, valid = greedy.greedy_veto(x, weight, keep, mask, tau)
    ascending = order.masked_fill(~valid, x.shape[1]).sort(dim=1).values
    return ascending.masked_fill(~valid, 0), valid
