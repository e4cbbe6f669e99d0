"""TransPrune: keep the tokens that the layers change and the question looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.rows import mean_row_attention
from prune.kernels.topk import topk_indices
from prune.method import Reducer, Site, Stage
from prune.registry import register
from prune.tokens import AttentionInputs, Reduction, VisualTokens

LAYERS, SHARES, OF = (7, 9, 12), (0.875, 0.625, 0.125), 32
"""The paper's three cuts ("TransPrune-High"), the share of the visual tokens each leaves, and the decoder's depth."""


@register
@dataclass
class TransPrune(Reducer):
    """In the middle layers, keep the visual tokens that the modules turn and stretch most and the text attends to.

    Based on "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model" (arXiv 2507.20630). Token
    transition variation (TTV): a module that makes `a` of `b` gives |a| / |b| times the softmax over tokens of
    1 - |cos(a, b)|; summed over self-attention and MLP and over the layers since the one before the first cut.
    Instruction-guided attention (IGA): softmax attention of the text after the image in the layer about to run, mean
    over heads and text. Score: alpha * TTV + (1 - alpha) * IGA, both scaled to sum 1.

    Three cuts, in front of `layers`. A final count of int(N / 8) gives the paper's 7/8, 5/8 and 1/8 of N; other counts
    take the power of these shares that ends at the count.

    Where paper, authors' code and we differ:
        - 1 - |cos| and a softmax over the image's tokens, as in the paper; the code has 1 - cos and a softmax over the
          whole sequence and batch. `compat=True` is the code's, per sample;
        - both scores are scaled to sum 1 before they are added, as in the code: the paper's plain sum of numbers of
          unlike size would depend on how long the prompt is;
        - `alpha` 0.5 of the paper is the code's plain sum (the same ranking);
        - kept tokens keep their position ids; the code renumbers them, which moves the text and, in decoding, needs a
          correction per cut layer;
        - every image of a sample is cut by itself, and columns of later images are no text; the code cuts the first
          image and takes the others for the question;
        - batch > 1, padding and grouped-query attention work; attention rows of the text only, in chunks.

    Cost: O((N + T) D) per measured layer and module, O(T (N + T) H d) per cut for T text tokens, and one projection
    of q and k per cut. Signals: transition, entry attention.

    Args:
        layers: the decoder layers in front of which the cuts are, ascending, at least 1 (fewer than three: the last of
            the cuts); TTV is measured from the layer before the first on. None: 7, 9, 12 of 32, or as deep elsewhere.
        alpha: weight of TTV, in [0, 1].
        compat: the authors' direction term and softmax.
        newlines: count separators inside the image (`image_newline`) as visual tokens, as the code does for LLaVA-NeXT.

    Raises:
        ConfigError: an option is out of range.
    """

    layers: tuple[int, ...] | None = None
    alpha: float = 0.5
    compat: bool = False
    newlines: bool = False

    name = "transprune"
    title = "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model"
    arxiv = "2507.20630"
    signals = ("transition", "entry_attention")
    needs_question = True

    def __post_init__(self):
        if self.layers is not None:
            if not ascending(self.layers) or len(self.layers) > 3:
                raise ConfigError(
                    f"layers={self.layers} must be up to three ascending numbers >= 1, such as (7, 9, 12)"
                )
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha!r} must be in [0, 1]: the weight of TTV beside attention")

    @property
    def transition_layers(self) -> tuple[int, ...]:
        return () if self.layers is None else tuple(range(self.layers[0] - 1, self.layers[-1]))

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        layers = self.layers or scale_layers(LAYERS, OF, geometry.layers)
        reducer = replace(self, layers=layers)
        counts = stage_counts(geometry.visual_tokens, keep)[-len(layers) :]
        return tuple(Stage(Site.parse(f"decoder:{n}"), reducer, count) for n, count in zip(layers, counts))

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        scores = transition_score(tokens, self.alpha, self.compat)
        return Reduction(*topk_indices(scores, keep, tokens.mask))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        columns = geometry.visual_tokens + geometry.text_tokens
        return 2 * geometry.text_tokens * columns * geometry.heads * geometry.head_dim


def stage_counts(n: int, keep: int) -> tuple[int, ...]:
    """Tokens of `n` left over after each of the three cuts, the last one being `keep`."""
    power = 1.0 if keep >= n or keep == int(n * SHARES[-1]) else math.log(keep / n) / math.log(SHARES[-1])
    shares = (1.0,) * 2 if keep >= n else [share**power for share in SHARES[:2]]
    return *(max(keep, int(n * share)) for share in shares), keep


@torch.no_grad()
def transition_score(tokens: VisualTokens, alpha: float, compat: bool) -> Tensor:
    """`[B, N]` fp32; see `TransPrune`."""
    variation = transition_variation(tokens, compat)
    attention = text_attention(tokens.entry_attention)
    parts = ((alpha, variation), (1 - alpha, attention))
    masked = [(weight, x.masked_fill(~tokens.mask, 0)) for weight, x in parts]
    return sum(weight * x / (x.sum(1, keepdim=True) + 1e-8) for weight, x in masked)


def transition_variation(tokens: VisualTokens, compat: bool = False) -> Tensor:
    """TTV `[B, N]` fp32, summed over the layers measured so far.

    The softmax of a layer is over the image's tokens as they were when it ran, some of which may be gone by now: its
    sum is kept in `memory` when the stage after the layer is here.
    """
    ratio, cosine = tokens.transition[..., 0::2], tokens.transition[..., 1::2]  # [B, N, A, 2]
    if compat:
        change, total = (1 - cosine).exp(), tokens.transition_sums
    else:
        change = (1 - cosine.abs()).exp()
        total = change.masked_fill(~tokens.mask[..., None, None], 0).sum(1)
        if (known := tokens.memory.get("transprune")) is not None:
            total = torch.cat([known, total[:, known.shape[1] :]], 1)
        tokens.memory["transprune"] = total
    return (ratio * change / total.clamp(min=1e-30)[:, None]).sum((2, 3))


def text_attention(inputs: AttentionInputs) -> Tensor:
    """`[B, N]` fp32: causal softmax attention of the text after each image to its tokens, mean over heads and text."""
    sample = inputs.sample
    queries = inputs.queries[sample[:, None], inputs.text_slots]
    received = mean_row_attention(
        queries, inputs.keys[sample], inputs.scale, inputs.text_slots, inputs.text_mask, inputs.valid[sample]
    )
    return received.gather(1, inputs.slots)
