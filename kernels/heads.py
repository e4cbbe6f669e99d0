"""What chosen query rows look at, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import ELEMENTS, column_attention, row_attention
from .dispatch import dispatched


@dispatched
def head_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    slots: Tensor,
    rows: Tensor,
    valid: Tensor,
    columns: Tensor,
    gain: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Causal softmax attention of some rows to some columns, mean over those rows, for every head.

    Args:
        q: `[S, R, H, d]` queries of the rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the logits.
        slots: `[S, R]` int64, the column each row is at; it looks at that one and what is before it.
        rows: `[S, R]` bool, the rows that count. With none the result is 0.
        valid: `[S, L]` bool, the columns that can be looked at; all of them are in the softmax.
        columns: `[S, C]` int64, those the result is wanted for.
        gain: `[S, R, C]` factor of the attention of a row to a column; None is 1.
        chunk: rows at a time; None takes as many as `prune.kernels.attention.ELEMENTS` allows.

    Returns:
        `[S, H, C]` fp32. Cost: O(S R L H d), peak memory `[S, H, chunk, L]` with a gain, a few tiles without one.
        Bytes moved: without a gain as in `mean_row_attention`; with one those of `row_attention`, and C of the L
        weights of every row read, multiplied and summed.
    """
    sequences, length, heads = *k.shape[:2], q.shape[2]
    number = rows.sum(1)[:, None, None].clamp(min=1)
    wanted = columns[:, None].expand(-1, heads, -1)
    if gain is None:
        return column_attention(q, k, scale, rows, valid, slots + 1, chunk=chunk).gather(2, wanted) / number
    chunk = chunk or max(1, ELEMENTS // max(1, sequences * heads * length))
    place = torch.arange(length, device=q.device)
    total = q.new_zeros(sequences, heads, columns.shape[1], dtype=torch.float32)
    for start in range(0, q.shape[1], chunk):
        part = slice(start, start + chunk)
        seen = (place <= slots[:, part, None]) & valid[:, None] & rows[:, part, None]
        weights = row_attention(q[:, part], k, scale, seen)
        weights = weights.gather(3, wanted[:, :, None].expand(-1, -1, weights.shape[2], -1))
        total += (weights * gain[:, None, part].masked_fill(~rows[:, None, part, None], 0)).sum(2)
    return total / number
