"""G-Prune: information flows over the graph of similar tokens, and gathers at representative ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels.graph import ELEMENTS, propagate
from prune.kernels.quota import quota_topk
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class GPrune(Reducer):
    """After the projector, keep the tokens that gather most information per neighbour.

    Based on "What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large Language
    Models from the Perspective of Graph" (arXiv 2501.02268). Tokens with cosine `similarity` or more are neighbours.
    Every token starts with its length and hands it on along the softmax of cosine / `temperature`, `iterations` times;
    the score is what it holds then, divided by its number of neighbours. So large uniform regions keep few
    representatives. The base view and the high-resolution grid are graphs of their own, with budgets in proportion.

    Where we differ from the authors' code:
        - all kinds of images: the code knows LLaVA-NeXT with 576 base tokens, 46 system tokens and several tiles only;
        - budgets follow `int(ratio * n)` per graph with the one ratio that makes the sum exact;
        - five matrix-vector products instead of the fifth power of an N x N matrix: same scores;
        - fp32: in half precision weak edges vanish, and up to half of the choice with them;
        - a zero vector keeps to itself; the code links it with every token of its graph.

    The paper is said to find `similarity` 0.7 best and to scale scores within connected components; the code has 0.5
    and divides by a token's own number of neighbours, and so do we.

    Cost: O(N^2 D) for the cosines and O(N^2) an iteration; above 8192 tokens, where the matrix is not stored,
    O(N^2 D) an iteration. No signals.

    Args:
        similarity: smallest cosine of neighbours, in [0, 1).
        temperature: of the softmax, > 0.
        iterations: at least 1.

    Raises:
        ConfigError: an option is out of range.
    """

    similarity: float = 0.5
    temperature: float = 0.03
    iterations: int = 5

    name = "gprune"
    title = (
        "What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large Language "
        "Models from the Perspective of Graph"
    )
    arxiv = "2501.02268"

    def __post_init__(self):
        if not 0 <= self.similarity < 1:
            raise ConfigError(f"similarity={self.similarity!r} must be in [0, 1)")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature!r} must be > 0")
        if self.iterations < 1:
            raise ConfigError(f"iterations={self.iterations!r} must be a whole number >= 1")

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        graph = torch.zeros_like(tokens.tile) if tokens.coordinates is None else tokens.coordinates[..., 0]
        score, _ = gprune(tokens.features, graph, tokens.mask, self.similarity, self.temperature, self.iterations)
        return Reduction(*quota_topk(score, graph, keep, tokens.mask))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        pairs = geometry.visual_tokens**2
        times = 1 if pairs <= ELEMENTS else self.iterations
        return 2 * pairs * (times * geometry.hidden_size + self.iterations)


def gprune(
    features: Tensor, graph: Tensor, mask: Tensor, similarity: float, temperature: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Score `[B, N]` fp32 and number of neighbours `[B, N]` of tokens `[B, N, D]`; `graph` `[B, N]` says whose."""
    length = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32)
    held, degree = propagate(features, length, graph, mask, similarity, temperature, iterations)
    return held / degree.clamp(min=1), degree
