"""From "which tokens stay" to the indices and slots a `Reduction` with a `Merge` is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def chosen_indices(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The chosen tokens `[B, N]` bool of every row, as `index` and `valid` `[B, width]`; see `topk_indices`.

    Args:
        width: at least the largest number chosen in a row, on the host.
    """
    n = chosen.shape[1]
    position = torch.arange(n, device=chosen.device).expand_as(chosen)
    index = torch.where(chosen, position, n).sort(dim=1).values[:, :width]
    index = torch.nn.functional.pad(index, (0, width - index.shape[1]), value=n)
    valid = index < n
    return index.masked_fill(~valid, 0), valid


def folds(chosen: Tensor, source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`source`, `slot` and `weight` of a merge.

    Args:
        chosen: `[B, N]` bool, the tokens that stay.
        source: `[B, M]` int64, what is folded in.
        target: `[B, M]` int64, the token that receives it. What is meant for a token that does not stay is lost.
        weight: `[B, M]` fp32; entries of weight 0 fold nothing, whatever their source holds.

    Returns:
        `[B, M]` each; an entry that folds nothing reads the row's first chosen token, which is real.
    """
    slot = (chosen.cumsum(1) - 1).clamp(min=0).gather(1, target)
    weight = weight.masked_fill(~chosen.gather(1, target), 0)
    first = chosen.to(torch.uint8).argmax(1, keepdim=True)
    idle = weight == 0
    return torch.where(idle, first, source), slot.masked_fill(idle, 0), weight
