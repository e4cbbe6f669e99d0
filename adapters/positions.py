"""Position ids of sequences that lost columns: 2-D, or 3-D with M-RoPE's axes in front."""

from __future__ import annotations

import torch
from torch import Tensor

from prune.kernels.compaction import dense_rank


def shift(positions: Tensor, delta: Tensor | None) -> Tensor:
    """Add the shift `[A, B]` of "compact" positions to `[B, L]` or `[A, B, L]` position ids."""
    if delta is None:
        return positions
    delta = delta.to(positions.device)[..., None]
    if positions.dim() == 2:
        return positions + delta[0]
    if len(positions) > len(delta):  # Qwen-VL adds a text axis in `generate` only
        delta = torch.cat([delta[:1], delta])
    return positions + delta[-len(positions) :]


def last_valid(valid: Tensor) -> Tensor:
    """`[B, 1]` int64: the last valid column of every row of `[B, L]`, 0 if there is none."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return torch.where(valid, columns, 0).amax(1, keepdim=True)


def renumber(axes: Tensor, valid: Tensor) -> Tensor:
    """Renumber `[A, B, L]` positions; of four axes the first counts text and is numbered on its own."""
    if len(axes) == 4:
        return torch.cat([dense_rank(axes[:1], valid), dense_rank(axes[1:], valid)])
    return dense_rank(axes, valid)
