"""Norm times diversity: long tokens that are unlike each other, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prune.kernels import topk_indices
from prune.kernels.diverse import importance_times_distance
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, VisualTokens


@register
@dataclass
class NormDiversity(Reducer):
    """After the projector, pick greedily by length of the features times cosine distance to the nearest pick.

    Based on no paper: a baseline for ZOO-Prune, whose sensitivity it replaces by the norm of the projected features,
    with which it goes nearly in step. Norms are scaled to [0, 1] and picks are made inside every tile, which gets its
    share of the budget.

    Cost: O(K N D). No signals.
    """

    name = "norm_diversity"
    title = "Norm times diversity (baseline)"

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        norm = torch.linalg.vector_norm(tokens.features, dim=-1, dtype=torch.float32)
        chosen = importance_times_distance(tokens.features, norm, keep, tokens.tile, tokens.mask)
        return Reduction(*topk_indices(chosen.float(), keep, tokens.mask))
