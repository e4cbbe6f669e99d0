"""Halve a set of tokens by merging every other one into its best match, round by round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import ELEMENTS
from .compaction import take
from .dispatch import dispatched
from .merging import chosen_indices
from .similarity import dot, unit
from .tiles import group_rank, group_sum


@dataclass
class Merged:
    """Where tokens went: `alive` `[B, N]` bool; the token `into` `[B, N]` int64 each is part of (itself if alive), and
    `weight` `[B, N]` fp32, its share there: the shares of one token sum to 1."""

    alive: Tensor
    into: Tensor
    weight: Tensor


@torch.no_grad()
def bipartite_merge(
    metric: Tensor, group: Tensor, target: Tensor, mask: Tensor, rounds: int, by_similarity: bool = False
) -> Merged:
    """Bipartite matching as in ToMe, with plain means, within every group until it has `target` tokens.

    In a round the tokens of a group are numbered; even ones are sources, odd ones destinations. Every source has a best
    destination by cosine, ties to the lowest index. The sources most similar to theirs are merged into them, up to half
    of the group: a destination becomes the plain mean of itself and what it gets, whatever these are means of.

    Args:
        metric: `[B, N, D]` float, compared and averaged along.
        group: `[B, N]` int64 from `tile_groups`.
        target: `[B, N]` int64, tokens to be left of each token's group; at least 1.
        mask: `[B, N]` bool.
        rounds: at most so many; every round leaves half of a group or more.
        by_similarity: number the tokens of later rounds as ToMe's code returns them, unmerged sources first, the most
            similar ones leading; False numbers by position.

    Returns:
        `Merged`. Cost: O(rounds N^2 D), in chunks of rows; one fp32 copy of `metric`. No host synchronisation. Bytes
        moved: in every round N^2 / 2 cosines in fp32, written, masked and read, and some ten passes over `[N, D]`.
    """
    n = metric.shape[1]
    x = metric.float().masked_fill(~mask[..., None], 0)
    alive, position = mask, torch.arange(n, device=x.device).expand(mask.shape)
    order, into, weight = position, position, torch.ones(mask.shape, device=x.device)
    for _ in range(rounds):
        size = group_sum(alive, group)
        number = group_rank(-order, group, alive)
        source, destination = alive & (number % 2 == 0), alive & (number % 2 == 1)
        best, similarity = _best(unit(x), source, destination, group)
        place = group_rank(similarity, group, source)
        merged = source & (place < torch.minimum(size // 2, size - target))
        goes = torch.where(merged, best, position)
        count = torch.ones_like(weight).scatter_add_(1, goes, merged.float())
        x = x.scatter_add(1, goes[..., None].expand_as(x), x * merged[..., None]) / count[..., None]
        into = goes.gather(1, into)
        weight = weight / count.gather(1, into)
        alive = alive & ~merged
        if by_similarity:
            order = torch.where(source, place, n + number)
    return Merged(alive, into, weight)


def _best(x: Tensor, source: Tensor, destination: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """For every source the destination of its group it is most similar to, and the cosine; `x` of length 1."""
    # At most every other token of a group is a destination.
    index, valid = chosen_indices(destination, max(1, x.shape[1] // 2))
    y, theirs = take(x, index), group.gather(1, index).masked_fill(~valid, -1)
    chunk = max(1, ELEMENTS // max(1, y.shape[0] * y.shape[1]))
    found = []
    for start in range(0, x.shape[1], chunk):
        rows = slice(start, start + chunk)
        with torch.autocast(x.device.type, enabled=False):
            cosine = x[:, rows] @ y.mT
        found.append(cosine.masked_fill_(group[:, rows, None] != theirs[:, None], -torch.inf).argmax(-1))
    best = index.gather(1, torch.cat(found, 1))
    # The matrix product finds the match, the plain product measures it: see `dot` on ties.
    return best, dot(x, take(x, best))


@dispatched
@torch.no_grad()
def best_match(x: Tensor, y: Tensor, mask: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """For every row of `x` the most similar candidate of `y`.

    Args:
        x: `[B, N, D]` float.
        y: `[B, M, D]` float, M at least 1.
        mask: `[B, M]` bool, the candidates. What the others hold, NaN included, has no influence.
        chunk: rows of `x` at a time; None takes as many as `ELEMENTS` allows.

    Returns:
        `index` `[B, N]` int64, ties to the lowest, and `cosine` `[B, N]` fp32, -inf where there is no candidate.
        Cost: O(B N M D), one matrix product, in chunks of rows; in Triton in tiles, of which only the best are kept.
        Bytes moved in torch: x and y in fp32, and N M cosines written, masked and read; in Triton x and y in their own
        dtype once per tile of the other, and the result.
    """
    x, y = unit(x), unit(y.masked_fill(~mask[..., None], 0))
    chunk = chunk or max(1, ELEMENTS // max(1, y.shape[0] * y.shape[1]))
    found = []
    for rows in x.split(chunk, dim=1):
        with torch.autocast(x.device.type, enabled=False):
            found.append((rows @ y.mT).masked_fill(~mask[:, None], -torch.inf).argmax(-1))
    best = torch.cat(found, 1)
    cosine = dot(x, y.gather(1, best[..., None].expand(-1, -1, y.shape[2])))  # see `_best`
    return best, cosine.masked_fill(~mask.any(1, keepdim=True), -torch.inf)
