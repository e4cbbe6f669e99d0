"""Batched tensor kernels. Pure functions, no model code; imported as `prune.kernels`."""

from .attention import attention_logits, attention_pagerank, received_attention, row_attention
from .bipartite import best_match
from .diverse import importance_times_distance
from .dpp import dpp_map
from .graph import propagate
from .greedy import farthest_point, greedy_veto, spread
from .heads import head_attention
from .neighbours import cosine_topk
from .rows import mean_row_attention, rows_to_columns
from .similarity import cosine_reduce, cosine_similarity, dot, unit
from .topk import topk_indices, topk_mask

__all__ = [
    "attention_logits",
    "attention_pagerank",
    "best_match",
    "cosine_reduce",
    "cosine_similarity",
    "cosine_topk",
    "dot",
    "dpp_map",
    "farthest_point",
    "greedy_veto",
    "head_attention",
    "importance_times_distance",
    "mean_row_attention",
    "propagate",
    "received_attention",
    "row_attention",
    "rows_to_columns",
    "spread",
    "topk_indices",
    "topk_mask",
    "unit",
]
