"""CDPruner: tokens that matter for the question and differ from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.kernels import dot, unit
from prune.kernels.dpp import dpp_map
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens


@register
@dataclass
class CDPruner(Reducer):
    """After the projector, keep the most probable subset of a DPP of similarity, conditioned on the question.

    Based on "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
    2506.10967). Greedy MAP of the kernel relevance_i * cosine_ij * relevance_j over projected features; relevance is
    the mean cosine of a token with the text after the image, scaled to [0, 1]. Each tile has its share of the picks.

    Where we differ from the authors' code:
        - relevance compares with the text in the language model's embedding space. The code takes CLIP's patch and
          text embeddings, whose text half no Hugging Face checkpoint of a vision-language model contains;
        - so its sign is that of the cosine: CLIP's is inverted, and the code negates it. `negate=True` does too;
        - the scale is that of the image: the code takes minimum and maximum over the batch, so that a row's result
          depends on the others. `joint=True` does too;
        - equal relevance everywhere counts as 1: the code divides by 0;
        - beyond the rank of the kernel picks are still different tokens: the code repeats some;
        - tiles share the count by their size; the code wants as many for each, and has no un-padded ones.

    Cost: O(k N (D + k)) in k steps. Signals: what enters the language model.

    Args:
        negate: least similar to the text is most relevant.
        joint: scale relevance over the whole batch.
    """

    negate: bool = False
    joint: bool = False

    name = "cdpruner"
    title = "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    arxiv = "2506.10967"
    signals = ("inputs",)
    tower = {"features": Tower("features")}  # costs nothing, and with it `tokens.tile` is known on anyres models
    needs_question = True
    positions = "compact"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        quality = text_relevance(tokens, self.negate, self.joint)
        order, valid = dpp_map(tokens.features, quality, keep, tokens.mask, crops(tokens))
        ascending = order.masked_fill(~valid, tokens.features.shape[1]).sort(dim=1).values
        return Reduction(ascending.masked_fill(~valid, 0), valid)


def text_relevance(tokens: VisualTokens, negate: bool = False, joint: bool = False) -> Tensor:
    """`[B, N]` fp32 in about [0, 1]: mean cosine of every token's input with those of the text; see `CDPruner`."""
    text = unit(tokens.text_inputs).masked_fill(~tokens.text_mask[..., None], 0).sum(1)
    mean = text / tokens.text_mask.sum(1, keepdim=True).clamp(min=1)
    cosine = dot(unit(tokens.inputs), mean[:, None])
    return min_max(-cosine if negate else cosine, tokens.mask, joint)


def min_max(x: Tensor, mask: Tensor, joint: bool = False) -> Tensor:
    """`x` `[B, N]` scaled to [1e-6, 1 + 1e-6] per row, or over all rows; 1 where all are equal, 0 at padding."""
    axes = (0, 1) if joint else (1,)
    low = x.masked_fill(~mask, torch.inf).amin(axes, keepdim=True)
    width = x.masked_fill(~mask, -torch.inf).amax(axes, keepdim=True) - low
    scaled = (x - low + 1e-6) / width
    return torch.where(width > 1e-6, scaled, 1).masked_fill(~mask, 0)


def crops(tokens: VisualTokens) -> Tensor:
    """`[B, N]` int64: the encoder's crop of every token. The frames of a video count as one."""
    if tokens.coordinates is None:
        return tokens.tile
    video = (tokens.coordinates[..., 1] > 0) & tokens.mask
    return tokens.tile.masked_fill(video.any(1, keepdim=True), 0)
