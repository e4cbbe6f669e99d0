"""Ragged compaction: drop columns of a batch of sequences and close the gaps."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(keep: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the surviving columns go when every row is right-aligned (left-padded) to a common length.

    Args:
        keep: `[B, L]` bool, True for columns that survive.
        length: new common length, on the host; at least the largest number of survivors of a row.

    Returns:
        source: `[B, length]` int64, the old column at every new one (0 at padding).
        valid: `[B, length]` bool, False at padding.
        target: `[B, L]` int64, the new column of every old one; `length` for columns that are gone.

    Cost: O(B L), no sort and no host synchronisation. Bytes moved: some ten passes over `[B, L]` int64.
    """
    batch, width = keep.shape
    rank = keep.cumsum(1)
    shift = length - rank[:, -1:]
    target = torch.where(keep, rank - 1 + shift, length)
    columns = torch.arange(width, device=keep.device).expand(batch, -1)
    source = torch.zeros(batch, length + 1, dtype=torch.long, device=keep.device).scatter_(1, target, columns)
    valid = torch.arange(length, device=keep.device) >= shift
    return source[:, :length], valid, target


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather columns per row: `x [*, B or 1, L, *]` at `index [B, M]` along `dim` (the batch is `dim - 1`)."""
    index = index.to(x.device)
    x = x.expand(*x.shape[: dim - 1], len(index), *x.shape[dim:])
    rows = torch.arange(len(index), device=x.device)[:, None]
    return x[(slice(None),) * (dim - 1) + (rows, index)]


def forward_fill(target: Tensor, length: int) -> Tensor:
    """For every old column the new column of the last survivor at or before it.

    Args:
        target: `[B, L]` as `compact` returns it (`length` for columns that are gone).
        length: the compacted length.

    Returns:
        `[B, L]` int64; columns before the first survivor of a row point to that survivor.
    """
    gone = target >= length
    filled = target.masked_fill(gone, -1).cummax(1).values
    first = target.amin(1, keepdim=True).clamp(max=length - 1)
    return torch.where(filled < 0, first, filled)


def dense_rank(values: Tensor, valid: Tensor) -> Tensor:
    """Renumber without gaps: the row's smallest valid value plus each value's rank among the distinct valid ones.

    Args:
        values: `[A, B, L]` int64; the A axes share one numbering (M-RoPE's t, h, w).
        valid: `[B, L]` bool; invalid columns get arbitrary numbers.

    One sort per row, no host synchronisation.
    """
    axes, batch, width = values.shape
    flat = values.masked_fill(~valid, torch.iinfo(values.dtype).max).transpose(0, 1).reshape(batch, axes * width)
    ordered, source = flat.sort(1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    lowest = torch.where(valid.any(1), ordered[:, 0], 0)[:, None]
    ranked = torch.empty_like(flat).scatter_(1, source, steps.cumsum(1) + lowest)
    return ranked.view(batch, axes, width).transpose(0, 1)
