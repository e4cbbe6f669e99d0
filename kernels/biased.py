"""Attention of vision transformers, where merged tokens may weigh more than others."""

from __future__ import annotations

from torch import Tensor

from .attention import attention_logits


def biased_attention(q: Tensor, k: Tensor, scale: float, valid: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows over all valid columns, with a bias per column.

    Args:
        q: `[S, R, H, d]`, any R rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the products.
        valid: `[S, L]` bool, the columns that can be looked at. What the others hold has no influence.
        bias: `[S, L]` fp32, added to the logits (log of sizes: proportional attention); None adds nothing.

    Returns:
        `[S, H, R, L]` fp32. Cost: O(S R L H d).
    """
    logits = attention_logits(q, k, scale, valid[:, None])
    if bias is not None:
        logits = logits + bias.masked_fill(~valid, 0)[:, None, None]
    return logits.softmax(-1).nan_to_num(0.0)
