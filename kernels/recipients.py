"""Fold tokens into several others at once, each into those it correlates with most (FiCoCo)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import ELEMENTS
from .merging import chosen_indices, folds

FEW = 8
"""Up to so many are found one by one, more by sorting."""


def recipients(correlation: Tensor, candidates: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The candidates above the quantile of every row, at least one, and the softmax over them, strongest first.

    Args:
        correlation: `[B, R, N]` fp32.
        candidates: `[B, N]` bool.
        quantile: of the row's correlations with candidates, in [0, 1).

    Returns:
        `[B, R, K]` int64 and fp32. Rows with fewer recipients than K have weight 0 at the end. Cost: for K up to `FEW`
        O(B R N K), else a stable sort of every row. Bytes moved: one copy of `correlation`, and a pass over it for each
        of the K, or its sort with int64 places.
    """
    allowed = correlation.masked_fill(~candidates[:, None], -torch.inf)
    n = candidates.sum(1) - 1
    number = (n - (n.double() * quantile).floor().long()).clamp(min=1)[:, None, None]
    most = max(1, candidates.shape[1] - 1 - int((candidates.shape[1] - 1) * quantile))
    logits, target = strongest(allowed, most)
    logits = logits.masked_fill(torch.arange(most, device=logits.device) >= number, -torch.inf)
    return target, logits.softmax(-1).nan_to_num(0.0)


def strongest(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest `number` of the last axis of `x` and their places, in falling order, ties to the lowest place.

    `x` is overwritten. Cost: a pass over `x` for each of a few, else a stable sort. Places of -inf are arbitrary.
    """
    if number > FEW:
        values, places = x.sort(dim=-1, descending=True, stable=True)
        return values[..., :number], places[..., :number]
    found = []
    for _ in range(number):
        place = x.argmax(-1, keepdim=True)
        found.append((x.gather(-1, place), place))
        x.scatter_(-1, place, -torch.inf)
    values, places = (torch.cat(parts, -1) for parts in zip(*found))
    return values, places


def split_among_recipients(
    correlation: Callable[[Tensor], Tensor],
    chosen: Tensor,
    mask: Tensor,
    keep: Sequence[int],
    quantile: float,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every token that goes gives to its recipients, as for a merge.

    Args:
        correlation: of tokens `[B, R]` with all, `[B, R, N]` fp32; called for a part of them at a time.
        chosen: `[B, N]` bool, the tokens that stay, `keep` of them in a row.
        mask: `[B, N]` bool.
        keep: on the host.
        quantile: as in `recipients`.
        candidates: `[B, N]` bool, those that can receive; what a token that goes receives is lost. None: all that stay.

    Returns:
        `source`, `slot` and `weight` `[B, M]`, see `folds`: the weights of one source are its shares, 1 together; and
        `received` `[B, max(keep)]` fp32, what every slot gets.
    """
    source, real = chosen_indices(mask & ~chosen, mask.shape[1] - min(keep, default=0))
    found = [
        recipients(correlation(part), chosen if candidates is None else candidates, quantile)
        for part in source.split(max(1, ELEMENTS // max(1, mask.numel())), dim=1)
    ]
    target, share = (torch.cat(parts, 1) for parts in zip(*found))  # [B, R, K]
    share = share.masked_fill(~real[..., None], 0)
    source = source[..., None].expand_as(target).flatten(1)
    source, slot, weight = folds(chosen, source, target.flatten(1), share.flatten(1))
    received = weight.new_zeros(len(mask), max(keep, default=0)).scatter_add_(1, slot, weight)
    return source, slot, weight, received
