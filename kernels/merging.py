"""From "which tokens stay" to the indices and slots a `Reduction` with a `Merge` is made of."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Weighted numbers held at a time: on a CPU 1 MiB of fp32, which stays in its cache."""


def chosen_indices(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The chosen tokens `[B, N]` bool of every row, as `index` and `valid` `[B, width]`; see `topk_indices`.

    Args:
        width: at least the largest number chosen in a row, on the host.

    O(B N), no sort and no host synchronisation.
    """
    slot = chosen.cumsum(1) - 1
    slot = torch.where(chosen & (slot < width), slot, width)  # the last column is a bin
    index = torch.zeros(len(chosen), width + 1, dtype=torch.int64, device=chosen.device)
    index.scatter_(1, slot, torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen))
    valid = torch.arange(width, device=chosen.device) < chosen.sum(1, keepdim=True)
    return index[:, :width].contiguous(), valid


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


def fold_into(out: Tensor, x: Tensor, source: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
    """Add `weight * x[source]` to `out[slot]`, in every row of the batch by itself.

    Args:
        out: `[B, K, D]` fp32; overwritten.
        x: `[B, N, D]` float.
        source, slot: `[B, M]` int64.
        weight: `[B, M]` fp32.

    Returns:
        `[B, K, D]` fp32. Cost: O(B M D), in pieces; whole vectors are added, in the order of the M, not single numbers.
        Bytes moved: M D numbers gathered, widened, multiplied and added, on a CPU from its cache after the first time.

    There is no Triton version: these are four launches a piece, bound by memory. One could do their work and move less,
    but by atomic additions, while `index_add_` can be told to be deterministic on CUDA, and has a backward.
    """
    (rows, width, dim), n = out.shape, x.shape[1]
    flat, sums = x.reshape(rows * n, dim), out.reshape(rows * width, dim)
    row = torch.arange(rows, device=x.device)[:, None]
    parts = (source + n * row, slot + width * row, weight)
    size = max(1, ELEMENTS.get(x.device.type, ELEMENTS["cpu"]) // max(1, dim))
    for begin, end, share in zip(*(part.flatten().split(size) for part in parts)):
        sums.index_add_(0, end, flat.index_select(0, begin).float() * share[:, None])
    return sums.view(out.shape)
