"""Attention weights as numbers to rank by: some rows, or sums over all rows, never all rows of all heads at once.

Everything is in fp32 whatever the inputs are, and grouped-query aware: `H` query heads share `Hkv` key heads in order,
`H / Hkv` each. Sequences have the length `L` in dimension 1 and the heads in dimension 2, as projections give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 26
"""Attention weights held at a time when no chunk is given: 256 MiB of fp32."""


def attention_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Scaled products of queries and keys.

    Args:
        q: `[S, R, H, d]`, any R rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the products.
        mask: `[S or 1, R or 1, L]` bool, True where a row may look; other entries become -inf. None shows all.

    Returns:
        `[S, H, R, L]` fp32. Cost: O(S R L H d).
    """
    sequences, rows, heads, dim = q.shape
    length, kv_heads = k.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        grouped = q.float().view(sequences, rows, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
        keys = k.float().permute(0, 2, 3, 1)
        logits = (grouped.reshape(sequences, kv_heads, -1, dim) @ keys).view(sequences, heads, rows, length) * scale
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


def row_attention(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows, `[S, H, R, L]` fp32; arguments as in `attention_logits`.

    A row that may look nowhere gets zeros.
    """
    weights = attention_logits(q, k, scale, mask).softmax(-1)
    return weights if mask is None else weights.nan_to_num(0.0)


def received_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Attention every column receives, mean over the query rows and heads.

    Args:
        q: `[S, L, H, d]`.
        k: `[S, L, Hkv, d]`.
        scale: factor of the logits.
        valid: `[S, L]` bool; columns that are not valid neither look nor are looked at. None means all are.
        mask: `[S or 1, L, L]` bool, True where a row may look, beside `valid` and `causal`.
        causal: rows look at themselves and what is before them only.
        chunk: query rows at a time; None takes as many as `ELEMENTS` allows.

    Returns:
        `[S, L]` fp32; sums to 1 over the valid columns if every valid row may look somewhere.

    Cost: O(S L^2 H d), peak memory `[S, H, chunk, L]`.
    """
    total = q.new_zeros(q.shape[0], q.shape[1], dtype=torch.float32)
    for rows, weights in _by_rows(q, k, scale, valid, mask, causal, chunk):
        summed = weights.mean(1)
        if valid is not None:
            summed = summed * valid[:, rows, None]
        total += summed.sum(1)
    return total / (q.shape[1] if valid is None else valid.sum(1, keepdim=True).clamp(min=1))


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    iterations: int = 5,
    temperature: float = 0.1,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> Tensor:
    """Importance that flows along attention: a distribution over columns, multiplied by the attention matrix.

    Every head starts from the uniform distribution over the valid columns, as a row vector, and is multiplied
    `iterations` times by its own softmax attention matrix.

    Args:
        q, k, scale, valid, mask, causal, chunk: as in `received_attention`.
        iterations: at least 0.
        temperature: the logits are divided by it. The defaults of both are those of AIM (arXiv 2412.03248).

    Returns:
        `[S, L]` fp32, the root mean square over heads.

    Cost: `iterations` times that of `received_attention`; the matrix is made anew each time, in chunks.
    """
    sequences, length, heads, _ = q.shape
    if valid is None:
        valid = torch.ones(sequences, length, dtype=torch.bool, device=q.device)
    rank = (valid.float() / valid.sum(1, keepdim=True).clamp(min=1))[:, None].expand(-1, heads, -1)
    for _ in range(iterations):
        flowed = torch.zeros_like(rank)
        for rows, weights in _by_rows(q, k, scale / temperature, valid, mask, causal, chunk):
            flowed += (rank[:, :, rows, None] * weights).sum(2)
        rank = flowed
    return rank.square().mean(1).sqrt()


def _by_rows(
    q: Tensor, k: Tensor, scale: float, valid: Tensor | None, mask: Tensor | None, causal: bool, chunk: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their softmax attention `[S, H, rows, L]`), chunk by chunk."""
    sequences, length, heads, _ = q.shape
    chunk = chunk or max(1, ELEMENTS // max(1, sequences * heads * length))
    column = torch.arange(length, device=q.device)
    for start in range(0, length, chunk):
        rows = slice(start, start + chunk)
        seen = None if valid is None else valid[:, None]
        if causal:
            before = (column <= column[rows, None])[None]
            seen = before if seen is None else seen & before
        if mask is not None:
            seen = mask[:, rows] if seen is None else seen & mask[:, rows]
        yield rows, row_attention(q[:, rows], k, scale, seen)
