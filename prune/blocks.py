"""What the attention of a vision transformer's block says about its patches."""

from __future__ import annotations

import torch
from torch import Tensor

from prune.kernels.attention import ELEMENTS
from prune.kernels.biased import biased_attention
from prune.kernels.compaction import take
from prune.tokens import BlockAttention


def patch_attention(block: BlockAttention, rows: Tensor, mask: Tensor) -> list[Tensor]:
    """Softmax attention of some patches to all patches, mean over heads.

    Args:
        rows: `[B, R]` int64, patches.
        mask: `[B, N]` bool.

    Returns:
        `[B, R, N]` fp32 in parts along R, 0 at padding; prefix tokens are in the softmax, not in the result. Cost:
        O(B R N H d), peak memory `[B, H, part, P + N]`.
    """
    length, heads = block.keys.shape[1:3]
    chunk = max(1, ELEMENTS // max(1, len(rows) * heads * length))
    parts = []
    for part in rows.split(chunk, dim=1):
        queries = take(block.queries, part + block.prefix)
        weights = biased_attention(queries, block.keys, block.scale, block.valid, block.bias)
        parts.append(weights.mean(1)[..., block.prefix :].masked_fill(~mask[:, None], 0))
    return parts


def summary_attention(block: BlockAttention, mask: Tensor) -> Tensor:
    """`[B, N]` fp32: attention of CLS, or of the mean query of the patches without CLS; mean over heads, 0 at padding.

    The softmax is over prefix tokens and patches.
    """
    query = block.queries[:, :1] if block.cls else mean_patch(block.queries[:, block.prefix :], mask)
    weights = biased_attention(query, block.keys, block.scale, block.valid, block.bias)
    return _of_patches(weights, block, mask)


def summary_similarity(block: BlockAttention, mask: Tensor) -> Tensor:
    """`[B, N]` fp32: the same with values in the place of queries and keys, not scaled."""
    value = block.values[:, :1] if block.cls else mean_patch(block.values[:, block.prefix :], mask)
    return _of_patches(biased_attention(value, block.values, 1.0, block.valid), block, mask)


def mean_patch(x: Tensor, mask: Tensor) -> Tensor:
    """`[B, 1, H, d]` fp32 of `[B, N, H, d]`."""
    total = x.float().masked_fill(~mask[..., None, None], 0).sum(1, keepdim=True)
    return total / mask.sum(1).clamp(min=1)[:, None, None, None]


def patch_sizes(sizes: Tensor | None, mask: Tensor) -> Tensor:
    """`[B, N]` fp32: patches every token stands for, 1 where nobody counted."""
    return torch.ones(mask.shape, device=mask.device) if sizes is None else sizes


def _of_patches(weights: Tensor, block: BlockAttention, mask: Tensor) -> Tensor:
    return weights[:, :, 0, block.prefix :].mean(1).masked_fill(~mask, 0)
