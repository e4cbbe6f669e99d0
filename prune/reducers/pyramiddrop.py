"""PyramidDrop: halve the visual tokens stage by stage, deeper and deeper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.compaction import take
from prune.kernels.depth import ascending, scale_layers
from prune.kernels.rows import mean_row_attention
from prune.method import Scorer, Site, Stage
from prune.registry import register
from prune.tokens import AttentionInputs, VisualTokens

LAYERS, OF = (8, 16, 24), 32
"""Where the paper cuts, and the number of layers of its decoder."""


@register
@dataclass
class PyramidDrop(Scorer):
    """In front of three layers, keep the visual tokens the last prompt token attends to most in that layer.

    Based on "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
    (arXiv 2410.17247). Attention comes from the layer about to run: its own input norm and projections; softmax over
    the whole sequence, mean over heads.

    Cuts at 1/4, 1/2 and 3/4 of the depth. With the default `shares` a final count of N / 8 is the paper's N / 2, N / 4
    and N / 8; other counts take the power of the shares that ends there, so that 1 / 27 leaves 1/3, 1/9 and 1/27.

    Where we differ from the authors' code:
        - kept tokens keep their position ids; the code renumbers them and corrects positions at every decoded token;
        - stages lie at the same share of any depth; the code's 8, 16, 24 serve its 40-layer model too: give `layers`;
        - stage counts round to nearest; the code rounds down (the same for 576 tokens);
        - grouped-query attention, padding on either side, batches and several images work;
        - only one attention row is computed, from keys of all tokens.

    Cost: O((N + T) D H d) for the layer's projections and O((N + T) H d) for the row, per stage. Signal: entry
    attention.

    Args:
        layers: the layers in front of which the cuts are, ascending, >= 1; None: 8, 16, 24 of 32 at any depth.
        shares: of the visual tokens, falling, after every cut at the paper's budget.

    Raises:
        ConfigError: an option is out of range, or there are not as many `layers` as `shares`.
    """

    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] = (0.5, 0.25, 0.125)

    name = "pyramiddrop"
    title = "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
    arxiv = "2410.17247"
    signals = ("entry_attention",)
    needs_question = True

    def __post_init__(self):
        shares = self.shares
        if not shares or not all(a > b for a, b in zip((1.0, *shares), (*shares, 0.0))):
            raise ConfigError(f"shares={shares} must fall, between 1 and 0, such as (0.5, 0.25, 0.125)")
        if self.layers is None and len(shares) == len(LAYERS):
            return
        layers = self.layers or ()
        if len(layers) != len(shares) or not ascending(layers):
            raise ConfigError(f"layers={layers} must be as many ascending whole numbers >= 1 as shares={shares}")

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        layers = self.layers or scale_layers(LAYERS, OF, geometry.layers)
        counts = self.counts(geometry.visual_tokens, keep)[-len(layers) :]
        return tuple(Stage(Site.parse(f"decoder:{n}"), self, count) for n, count in zip(layers, counts))

    def counts(self, n: int, keep: int) -> list[int]:
        """Tokens left of `n` after every cut, the last one `keep`."""
        power = math.log(keep / n) / math.log(self.shares[-1])
        return [max(keep, round(n * share**power)) for share in self.shares[:-1]] + [keep]

    def score(self, tokens: VisualTokens) -> Tensor:
        return last_row(tokens.entry_attention)

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        return 2 * (geometry.visual_tokens + geometry.text_tokens) * geometry.heads * geometry.head_dim


def last_row(at: AttentionInputs) -> Tensor:
    """`[B, N]` fp32: softmax attention of the last valid token to every visual token, mean over heads."""
    last = at.last[:, None]
    row = mean_row_attention(take(at.queries, last), at.keys, at.scale, last, torch.ones_like(last).bool(), at.valid)
    return row[at.sample].gather(1, at.slots)
