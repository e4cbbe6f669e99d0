"""What chosen query rows look at, on average."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Attention, between


def mean_row_attention(
    q: Tensor, k: Tensor, scale: float, slots: Tensor, rows: Tensor, valid: Tensor, chunk: int | None = None
) -> Tensor:
    found = Attention(q, k, scale, *between(slots + 1, rows), valid)
    return found.sums(found.lse()).mean(1) / rows.sum(1, keepdim=True).clamp(min=1)


def rows_to_columns(
    q: Tensor, k: Tensor, scale: float, rows: Tensor, valid: Tensor, chunk: int | None = None
) -> Tensor:
    found = Attention(q, k, scale, *between(torch.full_like(rows, k.shape[1], dtype=torch.int32), rows), valid)
    return found.sums(found.lse()).mean(1)
