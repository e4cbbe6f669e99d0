"""What chosen query rows look at, head by head."""

from __future__ import annotations

from torch import Tensor

from prune.kernels import heads

from .attention import Attention, between


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
    if gain is not None:  # rows have to be there one by one; `row_attention` gives them
        return heads.head_attention.reference(q, k, scale, slots, rows, valid, columns, gain, chunk)
    found = Attention(q, k, scale, *between(slots + 1, rows), valid)
    total = found.sums(found.lse()).gather(2, columns[:, None].expand(-1, q.shape[2], -1))
    return total / rows.sum(1)[:, None, None].clamp(min=1)
