"""Greedy selection, one token a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import dispatched
from .similarity import EPS, cosine_reduce, unit
from .topk import host_counts, to_device

SAME = 1e-6
"""Cosine distances below this are 0: fp32 cannot tell such tokens from equal ones, and rounding would order them."""

CACHED = 1 << 18
"""Products held at a time on a CPU: 1 MiB of fp32, which stays in its cache."""


@dispatched
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
        `x` a step. Two fp32 copies of `x`. No host synchronisation. In Triton one matrix of cosines, N^2 fp32 a row;
        see `prune.kernels.fused.greedy`. Bytes moved in torch: those of `cosine_reduce`, and `x` in fp32 every step, on
        CUDA three times, for products are written and read back; in Triton the N^2 fp32 written and read once, and 2 N
        every step.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    counts, mask = host_counts(k, len(x)), every(x) if mask is None else mask
    x = unit(x, eps)
    if not max(counts, default=0):
        return picks_of(torch.zeros(len(x), 0, dtype=torch.int64, device=x.device), counts, mask)
    nearest = 1 - cosine_reduce(x, None, "max", mask, chunk, eps)
    return _grow(x, nearest.masked_fill(nearest < SAME, 0), counts, mask, "nearest")


@dispatched
@torch.no_grad()
def spread(
    x: Tensor, first: Tensor, k: int | Sequence[int], mask: Tensor, rule: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Greedy picks of every row, starting from a given one: always the token most unlike those picked.

    Args:
        x: `[B, N, D]` float; cosines in fp32.
        first: `[B, 1]` int64, the first pick.
        k: picks per row, one count for all or one per row; host ints.
        mask: `[B, N]` bool, the candidates.
        rule: "nearest" picks the token farthest from its nearest pick, "sum" the one with the smallest sum of cosines
            to the picks.

    Returns:
        As `farthest_point`. Cost: O(k N D), one pass over `x` a step; one fp32 copy of `x`, on CUDA two. No host
        synchronisation. Bytes moved in torch: `x` in fp32 every step, on CUDA three times; in Triton N^2 fp32 written
        once, and 2 N read every step.

    Raises:
        ValueError: another `rule`, a count is negative, or there is not one per row.
    """
    if rule not in ("nearest", "sum"):
        raise ValueError(f"rule={rule!r} must be 'nearest' or 'sum'")
    start = torch.zeros(x.shape[:2], device=x.device).scatter_(1, first, 1.0)
    return _grow(unit(x.masked_fill(~mask[..., None], 0)), start, host_counts(k, len(x)), mask, rule)


@dispatched
@torch.no_grad()
def greedy_veto(x: Tensor, weight: Tensor, k: int | Sequence[int], mask: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Take the heaviest token, veto those alike, again and again.

    Args:
        x: `[B, N, D]` float; cosines in fp32.
        weight: `[B, N]`; ties go to the lowest index.
        k: picks per row, one count for all or one per row; host ints.
        mask: `[B, N]` bool, the candidates. What the others hold, NaN included, has no influence.
        tau: a taken token vetoes those with a larger cosine to it. Vetoed ones fill up what is missing, heaviest first.

    Returns:
        As `farthest_point`. Cost: O(k N D), one pass over `x` a step; one fp32 copy of `x`, on CUDA two. No host
        synchronisation. Bytes moved: as in `spread`.

    Raises:
        ValueError: a count is negative, or there is not one per row.
    """
    counts, cosines = host_counts(k, len(x)), RowDots(unit(x))
    weight = weight.float().clamp(min=torch.finfo(torch.float32).min)
    order, pick = torch.zeros(len(x), max(counts, default=0), dtype=torch.int64, device=x.device), cosines.pick
    free, left = mask.clone(), mask.clone()
    offered, unlike, none_free = torch.empty_like(mask), torch.empty_like(mask), torch.empty_like(mask[:, :1])
    key, lowest = torch.empty_like(weight), weight.new_full((), -torch.inf)
    for step in range(min(order.shape[1], x.shape[1])):
        torch.any(free, 1, keepdim=True, out=none_free).logical_not_()
        torch.logical_and(left, none_free, out=offered).logical_or_(free)
        torch.argmax(torch.where(offered, weight, lowest, out=key), 1, keepdim=True, out=pick)
        order[:, step : step + 1] = pick
        left.scatter_(1, pick, False)
        torch.le(cosines().clamp_(max=1), tau, out=unlike)
        free.logical_and_(left).logical_and_(unlike)
    return picks_of(order, counts, mask)


def _grow(x: Tensor, start: Tensor, counts: list[int], mask: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """`spread` over `x` of length 1 from the token where `start` `[B, N]` fp32 is largest; overwrites `start`."""
    order = torch.zeros(len(x), max(counts, default=0), dtype=torch.int64, device=x.device)
    cosines, score, closed = RowDots(x), start, ~mask
    far, key, same = torch.empty_like(score), torch.empty_like(score), torch.empty_like(mask)
    lowest, one = score.new_full((), -torch.inf), score.new_ones(())
    for step in range(min(order.shape[1], x.shape[1])):
        torch.argmax(torch.where(closed, lowest, score, out=key), 1, keepdim=True, out=cosines.pick)
        order[:, step : step + 1] = cosines.pick
        closed.scatter_(1, cosines.pick, True)
        cosine = cosines()
        torch.lt(torch.sub(one, cosine, out=far), SAME, out=same)
        gain = far.masked_fill_(same, 0) if rule == "nearest" else cosine.masked_fill_(same, 1).neg_()
        if step == 0:
            score.copy_(gain)
        elif rule == "nearest":
            torch.minimum(score, gain, out=score)
        else:
            score.add_(gain)
    return picks_of(order, counts, mask)


def every(x: Tensor) -> Tensor:
    """A mask `[B, N]` of all tokens."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def picks_of(order: Tensor, counts: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """`order` `[B, K]` with 0 beyond a row's count and its candidates, and `valid` `[B, K]`."""
    limit = torch.minimum(to_device(counts, mask.device), mask.sum(1))
    valid = torch.arange(order.shape[1], device=mask.device) < limit[:, None]
    return order.masked_fill(~valid, 0), valid


class RowDots:
    """Dot products of all rows of `x` `[B, N, D]` with one row of each image, step after step, in the same memory.

    Every product is summed in the same order, as by `dot`, so that equal rows get equal bits; no matrix product.

    Args:
        x: fp32; may change between calls.

    Attributes:
        pick: `[B, 1]` int64, to be filled in: the row.
    """

    def __init__(self, x: Tensor):
        rows, n, dim = x.shape
        # In pieces on a CPU, so that the products are read back from its cache.
        least = max(2, CACHED // max(1, rows * dim))  # a piece of one row might be summed in another order
        number = max(1, n // least) if x.device.type == "cpu" else 1
        self.flat, self.begin = x.reshape(rows * n, dim), n * torch.arange(rows, device=x.device)
        self.pick = torch.zeros(rows, 1, dtype=torch.int64, device=x.device)
        self.row, self.at = x.new_empty(rows, dim), torch.empty_like(self.begin)
        self.out = x.new_empty(rows, n)
        products = x.new_empty(rows, -(-n // number), dim)
        pieces = zip(x.tensor_split(number, 1), self.out.tensor_split(number, 1))
        self.parts = [(part, products[:, : part.shape[1]], out) for part, out in pieces]

    def __call__(self, width: int | None = None) -> Tensor:
        """`[B, N]` fp32, overwritten by the next call; over the first `width` columns only, if given."""
        torch.add(self.begin, self.pick[:, 0], out=self.at)
        torch.index_select(self.flat, 0, self.at, out=self.row)
        row = self.row[:, None, :width]
        for part, products, out in self.parts:
            torch.sum(torch.mul(part[..., :width], row, out=products[..., :width]), -1, out=out)
        return self.out
