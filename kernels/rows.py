"""What chosen query rows look at, on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import ELEMENTS, received_attention, row_attention
from .compaction import take


def mean_row_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    slots: Tensor,
    rows: Tensor,
    valid: Tensor,
    chunk: int | None = None,
) -> Tensor:
    """Causal softmax attention of some rows to every column, mean over those rows and the heads.

    Args:
        q: `[S, R, H, d]` queries of the rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the logits.
        slots: `[S, R]` int64, the column each row is at; it looks at that one and what is before it.
        rows: `[S, R]` bool, the rows that count. With none the result is 0.
        valid: `[S, L]` bool, the columns that can be looked at.
        chunk: rows at a time; None takes as many as `prune.kernels.attention.ELEMENTS` allows.

    Returns:
        `[S, L]` fp32. Cost: O(S R L H d), peak memory `[S, H, chunk, L]`.
    """
    sequences, length = k.shape[:2]
    chunk = chunk or max(1, ELEMENTS // max(1, sequences * q.shape[2] * length))
    column = torch.arange(length, device=q.device)
    total = q.new_zeros(sequences, length, dtype=torch.float32)
    for start in range(0, q.shape[1], chunk):
        part = slice(start, start + chunk)
        seen = (column <= slots[:, part, None]) & valid[:, None] & rows[:, part, None]
        total += row_attention(q[:, part], k, scale, seen).mean(1).sum(1)
    return total / rows.sum(1, keepdim=True).clamp(min=1)


def important_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    threshold: float,
    valid: Tensor | None = None,
    candidates: Tensor | None = None,
    received: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Attention every column receives from the important rows, mean over these rows and the heads.

    Important are candidates that themselves receive more than `threshold` times what candidates receive on average.
    Where there are none, all rows count: the result is `received_attention`.

    Args:
        q: `[S, L, H, d]`.
        k: `[S, L, Hkv, d]`.
        scale: factor of the logits.
        threshold: at least 0; 0 makes all candidates important.
        valid: `[S, L]` bool; columns that are not valid neither look nor are looked at. None means all are.
        candidates: `[S, L]` bool, the rows that may be important; None means all valid ones.
        received: `[S, L]` fp32, the `received_attention` of these arguments if it is there already.
        chunk: rows at a time, as in `mean_row_attention`.

    Returns:
        `[S, L]` fp32; sums to 1 over the valid columns. Cost: that of `received_attention`, and `important_rows` of L
        as much again.
    """
    sequences, length = q.shape[:2]
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    candidates = valid if candidates is None else valid & candidates
    if received is None:
        received = received_attention(q, k, scale, valid, chunk=chunk)
    mean = received.masked_fill(~candidates, 0).sum(1, keepdim=True) / candidates.sum(1, keepdim=True).clamp(min=1)
    important = candidates & (received > threshold * mean)
    rows = important_rows(length, threshold)
    index = important.float().topk(rows, dim=1).indices
    counts = important.gather(1, index)
    chunk = chunk or max(1, ELEMENTS // max(1, sequences * q.shape[2] * length))
    total = torch.zeros_like(received)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        weights = row_attention(take(q, index[:, part]), k, scale, valid[:, None]).mean(1)
        total += weights.masked_fill(~counts[:, part, None], 0).sum(1)
    number = counts.sum(1, keepdim=True)
    return torch.where(number > 0, total / number.clamp(min=1), received)


def important_rows(length: int, threshold: float) -> int:
    """How many of `length` numbers >= 0 can be more than `threshold` times their mean, at most."""
    return length if threshold <= 1 else math.ceil(length / threshold)
