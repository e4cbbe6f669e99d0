"""VisPruner: the tokens CLS attends to most, and what is left of the others without their duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune.budget import Geometry
from prune.errors import ConfigError
from prune.kernels import dot, topk_indices, unit
from prune.kernels.cluster import evened, first_equal
from prune.kernels.compaction import take
from prune.kernels.tiles import group_rank, group_sum, tile_groups, tile_shares
from prune.method import Reducer
from prune.registry import register
from prune.tokens import Reduction, Tower, VisualTokens

SCORES = {"cls": Tower("cls_attention"), "received": Tower("received_attention", -1)}
"""What `score` may be, and what is then read."""

STORED = 4096
"""Up to so many tokens the cosines of all pairs are kept; beyond, they are computed anew every round, in chunks."""
HELD = 1 << 24
"""Cosines worked on at a time, 64 MiB of fp32: whole images, at least one."""


@register
@dataclass
class VisPruner(Reducer):
    """Keep the tokens CLS attends to most, and of the rest those that survive the removal of near-duplicates.

    Based on "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv
    2412.01818, its first version is FasterVLM). The rest, sorted by attention, is split by even and odd rank; the
    even-ranked tokens most similar to an odd-ranked one go, `drop` a round, the survivors line up by similarity before
    the odd-ranked ones, until the budget is met. Attention and features are those of the vision encoder's layer the
    projector reads. Every tile of an image gets its share of the budget.

    Where we differ from the authors' code:
        - every count works: with an odd rest, or few tokens, the code fails;
        - the shares of tiles add up to the budget, and padded tiles of LLaVA-NeXT stay un-padded;
        - large tiles lose more tokens a round, so that none takes more than some 80 rounds (`drop=8` is the code's);
        - ties go to the lowest index; the code sorts unstably.

    Cost: O(R N^2 + N^2 D) for R rounds, about (N - K) / 8; beyond 4096 tokens O(R N^2 D).

    Args:
        important_ratio: share of the budget that goes by attention alone, in [0, 1] (0.5 in the paper).
        score: "cls", or "received" for vision encoders without CLS: the attention a token receives in the last layer,
            as in ports to SigLIP and Qwen2.5-VL (the latter compares tokens after the projector).
        drop: most tokens a tile loses in one round; None is max(8, n // 72) of n, that is 8 up to 647 tokens.

    Raises:
        ConfigError: an option is out of range.
    """

    important_ratio: float = 0.5
    score: str = "cls"
    drop: int | None = None

    name = "vispruner"
    title = "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    arxiv = "2412.01818"
    positions = "compact"

    def __post_init__(self):
        if not 0 <= self.important_ratio <= 1:
            raise ConfigError(f"important_ratio={self.important_ratio!r} must be a number in [0, 1]")
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} must be 'cls' or 'received'")
        if self.drop is not None and self.drop < 1:
            raise ConfigError(f"drop={self.drop!r} must be None or a whole number >= 1")

    @property
    def tower(self) -> dict[str, Tower]:
        return {"attention": SCORES[self.score], "features": Tower("features")}

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        important, rest = vispruner(
            tokens.tower["attention"],
            tokens.tower["features"],
            tokens.tile,
            tokens.mask,
            keep,
            self.important_ratio,
            self.drop,
        )
        n = tokens.mask.shape[1]
        return Reduction(*topk_indices(((important < n) | (rest < n)).float(), keep, tokens.mask))

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        if self.important_ratio == 1:
            return 0
        n = geometry.visual_tokens
        times = 1 if n <= STORED else rounds(n, keep, self.drop)
        return 2 * times * n * n * geometry.tower_features


@torch.no_grad()
def vispruner(
    attention: Tensor,
    features: Tensor | None,
    tile: Tensor,
    mask: Tensor,
    keep: Sequence[int],
    important_ratio: float,
    drop: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What is kept, as ranks `[B, N]` inside a token's tile, N for all other tokens; see `VisPruner`.

    Args:
        attention: `[B, N]`.
        features: `[B, N, D]`; not read if `important_ratio` is 1.
        tile: `[B, N]` int64.
        mask: `[B, N]` bool.
        keep: per row, on the host.

    Returns:
        The rank by attention of the important ones, and the final rank of the diverse ones.
    """
    n = mask.shape[1]
    group = tile_groups(tile, mask)
    share = tile_shares(keep, group, mask)
    count = (share.double() * important_ratio).long()
    rank = group_rank(attention.float(), group, mask)
    important = rank.masked_fill(rank >= count, n)
    if important_ratio == 1:
        return important, torch.full_like(rank, n)
    rest = torch.where(mask & (rank >= count), rank - count, n)
    step = (group_sum(mask, group) // 72).clamp(min=8) if drop is None else torch.full_like(rank, drop)
    x = unit(features.float().masked_fill(~mask[..., None], 0))
    most = rounds(n, min(keep), drop)
    return important, without_duplicates(x, rest, group, share - count, step, most)


def rounds(n: int, keep: int, drop: int | None) -> int:
    """As many rounds as any tile of a row of `n` tokens can need; the last few halve what is left."""
    steps = -(-(n - keep) // (drop or 8))
    return (steps if drop else min(steps, 81)) + (drop or max(8, n // 72)).bit_length()


def without_duplicates(x: Tensor, rank: Tensor, group: Tensor, target: Tensor, step: Tensor, most: int) -> Tensor:
    """Remove tokens like others, `most` rounds.

    Args:
        x: `[B, N, D]` fp32, rows of length 1.
        rank: `[B, N]` int64 order of the tokens inside their tile; N for those that do not take part.
        group: `[B, N]` of `tile_groups`.
        target, step: `[B, N]` int64, how many of a token's tile stay in the end, and at most go in a round.

    Returns:
        `[B, N]` the order of the survivors, N for the others.
    """
    n = x.shape[1]
    products = even_cosines(x, group) if n <= STORED else None
    for _ in range(most):
        left = rank < n
        even, odd = left & (rank % 2 == 0), left & (rank % 2 == 1)
        count = group_sum(left, group)
        half = (count + 1) // 2
        gone = (count - target).clamp(min=0).minimum(step).minimum(half)
        if products is None:
            similarity = nearest(x, odd, group)
        else:
            similarity = (products + torch.where(odd, 0.0, -torch.inf)[:, None]).amax(-1)
        order = group_rank(similarity, group, even)  # most similar first
        survivor = torch.where(order < gone, n, order - gone)
        moved = torch.where(even, survivor, half - gone + rank // 2)
        rank = torch.where(left & (gone > 0), moved, rank)
    return rank


def cosines(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # autocast would run an fp32 product in half precision
        return x @ y.transpose(1, 2)


def even_cosines(x: Tensor, group: Tensor) -> Tensor:
    """All cosines `[B, N, N]` of rows of length 1, with -inf between groups, such that equal pairs have equal bits.

    The matrix product is `evened`, and equal tokens have the plain product, as in `nearest`. O(N^2 D) once, where
    `nearest` passes over `x` every round.
    """
    out, few = x.new_empty(*x.shape[:2], x.shape[1]), max(1, HELD // max(1, x.shape[1] ** 2))
    for part, theirs, held in zip(x.split(few), group.split(few), out.split(few)):
        first = first_equal(part)
        products = evened(cosines(part, part), first)
        products = torch.where(first[:, :, None] == first[:, None], dot(part, part)[:, None], products)
        held.copy_(products.masked_fill_(theirs[:, :, None] != theirs[:, None], -torch.inf))
    return out


def nearest(x: Tensor, targets: Tensor, group: Tensor) -> Tensor:
    """`[B, N]` cosine of every token of `x` (rows of length 1) to the nearest of the `targets` `[B, N]` of its group.

    In chunks of tokens, with nothing stored.
    """
    n = x.shape[1]
    out = []
    chunk = max(1, STORED**2 // n)
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        seen = targets[:, None] & (group[:, part, None] == group[:, None])
        best, index = cosines(x[:, part], x).masked_fill(~seen, -torch.inf).max(-1)
        # The matrix product finds the neighbour, the plain product measures it: see `dot` on ties.
        out.append(torch.where(best == -torch.inf, best, dot(x[:, part], take(x, index))))
    return torch.cat(out, 1)
