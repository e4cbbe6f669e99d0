"""Importance times distance in one launch; see `fused.greedy`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.diverse import relative
from prune.kernels.greedy import SAME
from prune.kernels.tiles import tile_groups, tile_shares

from .greedy import Lines, best_of, distance_of, line_of, slots


@torch.no_grad()
def importance_times_distance(x: Tensor, importance: Tensor, keep: Sequence[int], tile: Tensor, mask: Tensor) -> Tensor:
    lines = Lines.of(x)
    group = tile_groups(tile, mask)
    share, score = tile_shares(keep, group, mask), relative(importance, group, mask)
    chosen = torch.empty_like(mask, memory_format=torch.contiguous_format)
    given = (score.contiguous(), group.contiguous(), share.contiguous(), mask.contiguous())
    _pick[(len(x),)](*lines, *given, slots(list(keep), mask)[1], chosen, x.shape[1], SAME=SAME, **lines.launch)
    return chosen


@triton.jit
def _pick(products, scale, score, group, share, mask, limit, out, n, SAME: tl.constexpr, BLOCK: tl.constexpr):
    image, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    base = image * n
    weight = tl.load(score + base + at, mask=at < n, other=0.0)
    mine = tl.load(group + base + at, mask=at < n, other=-1).to(tl.int32)
    left = tl.load(share + base + at, mask=at < n, other=0).to(tl.int32)
    real = tl.load(mask + base + at, mask=at < n, other=0).to(tl.int1)
    offered = real
    distance = tl.full((BLOCK,), 3.0, tl.float32)  # above any cosine distance: nothing is picked yet
    for _ in range(tl.load(limit + image)):
        pick = best_of(weight * distance, offered & (left > 0))
        offered = offered & (at != pick)
        far = distance_of(line_of(products, scale, image, pick, at, n), SAME)
        near = mine == tl.load(group + base + pick)
        left = tl.where(near, left - 1, left)
        distance = tl.where(near, tl.minimum(distance, far), distance)
    tl.store(out + base + at, real & (offered == 0), mask=at < n)
