"""Batched top-k with a k and a number of candidates per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from operator import index as as_int

import torch
from torch import Tensor

from .dispatch import dispatched
from .merging import chosen_indices


def host_counts(k: int | Sequence[int], rows: int) -> list[int]:
    """`k` as one host int per row.

    Raises:
        ValueError: a count is negative, or there is not one per row.
        TypeError: a count is no whole number.
    """
    counts = [as_int(k)] * rows if isinstance(k, Integral) else [as_int(n) for n in k]
    if len(counts) != rows or any(n < 0 for n in counts):
        raise ValueError(f"k wants one count >= 0 for each of {rows} rows, got {counts}")
    return counts


def to_device(counts: Sequence[int], device: torch.device) -> Tensor:
    """Host ints as an int64 tensor on `device`, without waiting for it."""
    return torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)


@dispatched
@torch.no_grad()
def topk_mask(scores: Tensor, k: int | Sequence[int] | Tensor, mask: Tensor | None = None) -> Tensor:
    """Mark the `k` highest-scored tokens of every row.

    Ties go to the lowest index. NaN ranks below every number and above masked tokens, which are never marked. A row
    with fewer than k candidates has all of them marked. No row influences another.

    Args:
        scores: `[B, N]` float. Values at masked places are ignored.
        k: one count for all rows, one per row (host ints), or a `[B]` integer tensor on the device of `scores`.
        mask: `[B, N]` bool, the candidates; None means all.

    Returns:
        `[B, N]` bool.

    Cost: one stable sort of `[B, N]`; no host synchronisation. Bytes moved in Triton: the scores, the mask and the
        result, once.

    Raises:
        ValueError: a host count is negative, or there is not one per row.
    """
    if not isinstance(k, Tensor):
        k = to_device(host_counts(k, len(scores)), scores.device)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    # An ascending sort puts NaN last. A constant NaN: negation flips the sign bit, by which a radix sort would rank it.
    falling = (-scores).masked_fill(scores.isnan(), math.nan)
    order = falling.sort(dim=1, stable=True).indices
    candidate = mask.gather(1, order)
    chosen = candidate & (candidate.cumsum(1) <= k[:, None])
    return torch.zeros_like(mask).scatter(1, order, chosen)


@dispatched
@torch.no_grad()
def topk_indices(scores: Tensor, k: int | Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the `k` highest-scored tokens of every row, ascending; ranking as in `topk_mask`.

    Args:
        scores: `[B, N]` float.
        k: one count for all rows, or one per row; host ints. May exceed the number of candidates.
        mask: `[B, N]` bool, the candidates; None means all.

    Returns:
        `index` `[B, K]` int64 and `valid` `[B, K]` bool with K = max(k): every row's indices ascend over its valid
        slots, which come first; slots that are not valid (k smaller than K, too few candidates) hold index 0.

    Cost: one stable sort of `[B, N]`; no host synchronisation. Bytes moved in Triton: the scores and the mask, once.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    counts = host_counts(k, len(scores))
    return chosen_indices(topk_mask(scores, counts, mask), max(counts, default=0))
