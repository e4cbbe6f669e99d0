"""Clustering by density peaks (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from .topk import topk_mask

ELEMENTS = 1 << 26
"""Distances held at a time: 256 MiB of fp32."""


@torch.no_grad()
def density_peaks(
    x: Tensor, clusters: Tensor, mask: Tensor, bonus: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Split every row's points into clusters around its density peaks.

    Distances are Euclidean over sqrt(D). The density of a point is exp(-mean of the squared distances to its nearest
    points), as many as there are clusters, itself included; its separation the distance to the nearest denser point,
    for the densest one the largest distance in the row. Centres have the largest density * separation; every point
    joins the nearest centre. Of equally dense points the first counts as denser; all other ties go to the lowest
    index too.

    Args:
        x: `[B, M, D]` float; everything in fp32.
        clusters: `[B]` int64, at most the row's number of points.
        mask: `[B, M]` bool, the points. What the other rows hold, NaN included, has no influence.
        bonus: `[B, M]` added to the density (authors' codes add noise).
        chunk: points compared at a time; None takes as many as `ELEMENTS` allows.

    Returns:
        `[B, M]` int64: the centre of every point's cluster, itself for a centre; 0 at padding.

    Cost: O(B M^2 D), one matrix product, three where the distances do not fit into one chunk. Distances of equal points
        are 0; in one chunk they are the same to the bit both ways, and equal points have equal ones. Bytes moved: a
        sort of the M^2 distances in fp32, and some thirty passes over them, in chunks.
    """
    rows, n, dim = x.shape
    x = x.float().masked_fill(~mask[..., None], 0) / dim**0.5
    # Without the mean, distances would be lost in large equal numbers.
    x = (x - x.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]).masked_fill_(~mask[..., None], 0)
    length, first = torch.linalg.vector_norm(x, dim=-1).square(), first_equal(x)
    chunk = chunk or max(1, ELEMENTS // max(1, rows * n))
    spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    held: dict[int, Tensor] = {}

    def distance(span: slice) -> Tensor:
        """`[B, chunk, M]`, inf to padding."""
        if span.start in held:
            return held[span.start]
        with torch.autocast(x.device.type, enabled=False):
            d = torch.baddbmm(length[:, None], x[:, span], x.mT, alpha=-2).add_(length[:, span, None])
        d = d.clamp_(min=0).sqrt_()
        if len(spans) == 1:
            d = evened(d, first)  # equal points are equally far from all others
        d.masked_fill_(first[:, span, None] == first[:, None], 0).masked_fill_(~mask[:, None], torch.inf)
        if len(spans) == 1:
            held[span.start] = d
        return d

    nearest = torch.arange(n, device=x.device) < clusters[:, None, None]
    density, farthest = x.new_zeros(rows, n), x.new_zeros(rows, 1)
    for span in spans:
        d = distance(span)
        near = d.sort(-1).values.square().masked_fill(~nearest, 0).sum(-1) / clusters[:, None].clamp(min=1)
        density[:, span] = (-near).exp()
        real = d.masked_fill(~(mask[:, span, None] & mask[:, None]), 0)
        farthest = torch.maximum(farthest, real.amax((1, 2))[:, None])
    if bonus is not None:
        density = density + bonus

    place = torch.arange(n, device=x.device)
    score = x.new_zeros(rows, n)
    for span in spans:
        mine, other = density[:, span, None], density[:, None]
        denser = (other > mine) | ((other == mine) & (place < place[span, None]))
        gap = distance(span).masked_fill(~denser, torch.inf).amin(-1)
        score[:, span] = density[:, span] * torch.minimum(gap, farthest)
    centre = topk_mask(score, clusters, mask)

    found = torch.cat([distance(span).masked_fill(~centre[:, None], torch.inf).argmin(-1) for span in spans], 1)
    return torch.where(centre, place, found).masked_fill(~mask, 0)


def first_equal(x: Tensor) -> Tensor:
    """`[B, N]` int64: of every row of `x` `[B, N, D]` fp32 the first one that equals it bit by bit."""
    factors = torch.full(x.shape[2:], 0x9E3779B97F4A7C1, device=x.device).cumprod(0)  # odd; wraps around
    key = ((x + 0.0).view(torch.int32) * factors).sum(-1)  # + 0: equal to minus zero
    place = torch.arange(x.shape[1], device=x.device).expand_as(key)
    ordered, order = key.sort(dim=1, stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, start))
    return torch.where((x.gather(1, first[..., None].expand_as(x)) == x).all(-1), first, place)


def evened(pairs: Tensor, first: Tensor) -> Tensor:
    """`pairs` `[B, N, N]` of a matrix product, which sums in any order, with equal bits where rows are equal.

    Made symmetric, and a row has what the first one that equals it has; `first` is that of `first_equal`. Pairs of
    equal rows are left to the caller.
    """
    pairs = torch.maximum(pairs, pairs.mT)
    rows = first[:, :, None].expand_as(pairs)
    return pairs.gather(1, rows).gather(2, rows.mT)
