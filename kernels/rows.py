"""What chosen query rows look at, on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import by_segment, column_attention, received_attention
from .compaction import take
from .dispatch import dispatched


@dispatched
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
        chunk: rows at a time, at most.

    Returns:
        `[S, L]` fp32. Cost: O(S R L H d), twice that in Triton; memory as in `received_attention`. Bytes moved in
        Triton: q or k once per tile of the other, `[S, H, R]` and `[S, H, L]` fp32 twice; torch also writes k and the
        weights in fp32, tile by tile.
    """
    total = column_attention(q, k, scale, rows, valid, slots + 1, chunk=chunk).mean(1)
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
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attention every column receives from the important rows, mean over these rows and the heads.

    Important are candidates that themselves receive more than `threshold` times what candidates receive on average.
    Where there are none, all rows count: the result is `received_attention`.

    Args:
        q: `[S, L, H, d]`; `[P, H, d]` with `cu_seqlens`.
        k: `[S, L, Hkv, d]`; `[P, Hkv, d]` with `cu_seqlens`.
        scale: factor of the logits.
        threshold: at least 0; 0 makes all candidates important.
        valid: `[S, L]` bool; columns that are not valid neither look nor are looked at. None means all are.
        candidates: `[S, L]` bool, the rows that may be important; None means all valid ones.
        received: `[S, L]` fp32, the `received_attention` of these arguments if it is there already.
        chunk: rows at a time, as in `mean_row_attention`.
        cu_seqlens: packed sequences as in `received_attention`, all of whose columns are valid. `candidates` and
            `received` are `[P]` then.

    Returns:
        `[S, L]` or `[P]` fp32; sums to 1 over the valid columns of a sequence. Cost: that of `received_attention`, and
        `important_rows` of L as much again. With `cu_seqlens` the lengths are read on the host.
    """
    if cu_seqlens is not None:
        if valid is not None:
            raise ValueError("cu_seqlens says what is valid: give no valid beside it")
        if received is None:
            received = received_attention(q, k, scale, cu_seqlens=cu_seqlens, chunk=chunk)

        def run(q: Tensor, k: Tensor, candidates: Tensor | None, received: Tensor) -> Tensor:
            return important_attention(q, k, scale, threshold, None, candidates, received, chunk)

        return by_segment(run, cu_seqlens, q, k, candidates, received)
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    candidates = valid if candidates is None else valid & candidates
    if received is None:
        received = received_attention(q, k, scale, valid, chunk=chunk)
    mean = received.masked_fill(~candidates, 0).sum(1, keepdim=True) / candidates.sum(1, keepdim=True).clamp(min=1)
    important = candidates & (received > threshold * mean)
    index = important.float().topk(important_rows(q.shape[1], threshold), dim=1).indices
    counts = important.gather(1, index)
    total = rows_to_columns(take(q, index), k, scale, counts, valid, chunk)
    number = counts.sum(1, keepdim=True)
    return torch.where(number > 0, total / number.clamp(min=1), received)


@dispatched
def rows_to_columns(
    q: Tensor, k: Tensor, scale: float, rows: Tensor, valid: Tensor, chunk: int | None = None
) -> Tensor:
    """Softmax attention of some rows, wherever they are, to every column: mean over the heads, sum over the rows.

    Args:
        q, k, scale, rows, valid, chunk: as in `mean_row_attention`.

    Returns:
        `[S, L]` fp32. Cost and memory as of `mean_row_attention`. Bytes moved: as there.
    """
    return column_attention(q, k, scale, rows, valid, chunk=chunk).mean(1)


def important_rows(length: int, threshold: float) -> int:
    """How many of `length` numbers >= 0 can be more than `threshold` times their mean, at most."""
    return length if threshold <= 1 else math.ceil(length / threshold)
