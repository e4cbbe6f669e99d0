"""What direct implementations share: cosines, shares of tiles, attention matrices. One sample at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from prune.tokens import AttentionInputs, BlockAttention, VisualTokens


def cosines(x: Tensor, y: Tensor | None = None) -> Tensor:
    """All cosines `[N, M]` of rows `[N, D]` and `[M, D]`."""
    x, y = (z.float() / z.float().norm(dim=-1, keepdim=True).clamp(min=1e-8) for z in (x, x if y is None else y))
    return x @ y.T


def top(scores: Tensor, k: int) -> list[int]:
    """Indices of the k highest, the best first, ties to the lowest index."""
    return scores.sort(descending=True, stable=True).indices[:k].tolist()


def tiles_of(numbers: Tensor) -> list[list[int]]:
    """The places of every tile, ascending."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(numbers.tolist()):
        found.setdefault(number, []).append(place)
    return [found[number] for number in sorted(found)]


def shares(keep: int, sizes: list[int]) -> list[int]:
    """`keep` split in proportion to sizes, by largest remainder, ties to the first."""
    total = sum(sizes)
    out = [keep * size // total for size in sizes]
    for _, tile in sorted((-(keep * size % total), tile) for tile, size in enumerate(sizes))[: keep - sum(out)]:
        out[tile] += 1
    return out


def tile_shares(t: VisualTokens, b: int, keep: int) -> list[tuple[list[int], int]]:
    """The places of every tile of image b, and how many of them stay."""
    tiles = tiles_of(t.tile[b])
    return list(zip(tiles, shares(keep, [len(tile) for tile in tiles])))


def quota_top(scores: Tensor, numbers: Tensor, k: int) -> list[int]:
    """The best of every tile, int(ratio * n) of a tile of n, with the one ratio that makes it k together."""
    order, taken = {}, []
    for tile in tiles_of(numbers):
        for rank, i in enumerate(top(scores[tile], len(tile)), 1):
            order[tile[i]] = rank / len(tile)
    for place in sorted(order, key=lambda i: (order[i], i))[:k]:
        taken.append(place)
    return taken


def attention_matrix(at: AttentionInputs, row: int, temperature: float = 1.0) -> Tensor:
    """`[H, L, L]` causal softmax attention of one sequence."""
    q, k = at.queries[row].float().transpose(0, 1), at.keys[row].float().transpose(0, 1)
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q @ k.mT * at.scale
    if at.causal:
        length = logits.shape[-1]
        logits = logits.masked_fill(torch.ones(length, length, device=q.device).triu(1).bool(), -torch.inf)
    return (logits.masked_fill(~at.valid[row], -torch.inf) / temperature).softmax(-1).nan_to_num(0.0)


def block_attention(block: BlockAttention, b: int) -> Tensor:
    """`[H, P + N, P + N]` softmax attention of a block of a vision transformer."""
    q, k = block.queries[b].float().transpose(0, 1), block.keys[b].float().transpose(0, 1)
    bias = 0 if block.bias is None else block.bias[b]
    return (q @ k.mT * block.scale + bias).softmax(-1)


def density_peaks(x: Tensor, clusters: int) -> list[int]:
    """Centres of DPC-KNN: the points with the largest density times distance to the nearest denser point."""
    distance = torch.cdist(x.float(), x.float()) / x.shape[1] ** 0.5
    density = (-distance.sort(-1).values[:, :clusters].square().mean(-1)).exp()
    separation = torch.zeros(len(x))
    for i in range(len(x)):
        denser = density > density[i]
        separation[i] = distance[i][denser].min() if denser.any() else distance.max()
    return top(density * separation.to(density), clusters)


def dpp(x: Tensor, quality: Tensor, k: int, tile: Tensor) -> list[int]:
    """Greedy MAP of the kernel quality * cosine * quality, by incremental Cholesky; tiles share the picks."""
    kernel = quality[:, None] * cosines(x) * quality * (tile[:, None] == tile)
    left = {number: 0 for number in tile.tolist()}
    for place in quota_top(torch.zeros(len(x)), tile, k):
        left[int(tile[place])] += 1
    rest, factors, picks = kernel.diagonal().clone(), torch.zeros(k, len(x), device=x.device), []
    for step in range(k):
        shut = [i for i, number in enumerate(tile.tolist()) if not left[number]]
        pick = int(rest.index_fill(0, torch.tensor([*picks, *shut], dtype=torch.long), -torch.inf).argmax())
        column = (kernel[pick] - factors[:step].T @ factors[:step, pick]) / rest[pick].clamp(min=1e-30).sqrt()
        factors[step], rest = column, rest - column.square()
        left[int(tile[pick])] -= 1
        picks.append(pick)
    return picks
