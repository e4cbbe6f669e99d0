"""Greedy selection, one token a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compaction import take
from .similarity import EPS, cosine_reduce, dot, unit
from .topk import host_counts, to_device

SAME = 1e-6
"""Cosine distances below this are 0: fp32 cannot tell such tokens from equal ones, and rounding would order them."""


@torch.no_grad()
def farthest_point(
    x: Tensor, k: int | Sequence[int], mask: Tensor | None = None, chunk: int = 1024, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Max-min greedy on cosine distance: spread `k` tokens of every row as far apart as possible.

    The first pick is the token whose nearest other token is farthest; every next one is the token farthest from its
    nearest pick. A token is picked once, however many equals it has. Ties go to the lowest index; distances below 1e-6
    count as 0.

    Args:
        x: `[B, N, D]` float; distances in fp32.
        k: picks per row, one count for all or one per row; host ints.
        mask: `[B, N]` bool, the candidates; None means all. What the other rows hold has no influence.
        chunk: rows compared at a time while the first pick is sought; see `cosine_reduce`.
        eps: as in `unit`.

    Returns:
        `order` `[B, K]` int64, the picks in the order they were made, and `valid` `[B, K]` bool with K = max(k); slots
        beyond a row's k or its number of candidates come last, are not valid and hold index 0.

    Cost: O(N^2 D) for the first pick, a matrix product in chunks, then O(k N D): a running minimum, one pass over
        `x` a step. Two fp32 copies of `x`. No host synchronisation.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    rows, n, _ = x.shape
    counts = host_counts(k, rows)
    if mask is None:
        mask = torch.ones(rows, n, dtype=torch.bool, device=x.device)
    x = unit(x, eps)
    order = torch.zeros(rows, max(counts, default=0), dtype=torch.int64, device=x.device)
    closed = ~mask
    score = _distance(cosine_reduce(x, None, "max", mask, chunk, eps)) if order.shape[1] else None
    for step in range(min(order.shape[1], n)):
        pick = score.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
        order[:, step : step + 1] = pick
        closed.scatter_(1, pick, True)
        # No matrix product, so that equal tokens are equally far.
        distance = _distance(dot(x, take(x, pick)))
        score = distance if step == 0 else torch.minimum(score, distance)
    limit = torch.minimum(to_device(counts, x.device), mask.sum(1))
    valid = torch.arange(order.shape[1], device=x.device) < limit[:, None]
    return order.masked_fill(~valid, 0), valid


def _distance(cosine: Tensor) -> Tensor:
    distance = 1 - cosine
    return distance.masked_fill(distance < SAME, 0)
