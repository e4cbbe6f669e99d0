"""Batched tensor kernels. Pure functions, no model code; imported as `prune.kernels`."""

from .attention import attention_logits, attention_pagerank, received_attention, row_attention
from .greedy import farthest_point
from .similarity import cosine_reduce, cosine_similarity, dot, unit
from .topk import topk_indices, topk_mask

__all__ = [
    "attention_logits",
    "attention_pagerank",
    "cosine_reduce",
    "cosine_similarity",
    "dot",
    "farthest_point",
    "received_attention",
    "row_attention",
    "topk_indices",
    "topk_mask",
    "unit",
]
