"""Batched tensor kernels. Pure functions, no model code; imported as `prune.kernels`."""

from .greedy import farthest_point
from .similarity import cosine_reduce, cosine_similarity, dot, unit
from .topk import topk_indices, topk_mask

__all__ = [
    "cosine_reduce",
    "cosine_similarity",
    "dot",
    "farthest_point",
    "topk_indices",
    "topk_mask",
    "unit",
]
