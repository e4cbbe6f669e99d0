"""Random: the baseline every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.errors import ConfigError
from prune.method import Scorer
from prune.registry import register
from prune.tokens import VisualTokens


@register
@dataclass
class Random(Scorer):
    """Keep a uniformly random subset of each image's tokens.

    Based on no paper: the baseline. One number is drawn per token index, on the CPU, from `seed` alone: the draw is the
    same on every device, rank and run, for every image and wherever the image lies in a batch.

    Cost: O(N). No signals.

    Args:
        seed: of the draw.
        layer: None acts after the projector, k at the input of decoder layer k.

    Raises:
        ConfigError: `seed` is no whole number, `layer` is neither None nor a whole number >= 0.
    """

    seed: int = 0
    layer: int | None = None

    name = "random"
    title = "Random subset (baseline)"

    def __post_init__(self):
        if self.layer is not None and self.layer < 0:
            raise ConfigError(f"layer={self.layer!r} must be None (after the projector) or a whole number >= 0")

    @property
    def site(self) -> str:
        return "projected" if self.layer is None else f"decoder:{self.layer}"

    def score(self, tokens: VisualTokens) -> Tensor:
        return random_scores(tokens.features, self.seed)


def random_scores(features: Tensor, seed: int) -> Tensor:
    """`[B, N]` fp32 in [0, 1) for `features` `[B, N, D]`; every row alike, and a prefix of the draw for a longer N."""
    rows, n, _ = features.shape
    draw = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return draw.to(features.device, non_blocking=True).expand(rows, n)
