"""Top-k in one launch, one program per row: the k-th largest score is found bit by bit, from the highest.

Pays over torch's sort because of its launches: a stable sort, the counting of candidates and the sort of indices are
about 20 of them, for rows that fit into the registers of one program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.dispatch import NotServed
from prune.kernels.topk import host_counts, to_device

LONGEST = 1 << 15


@torch.no_grad()
def topk_mask(scores: Tensor, k: int | Sequence[int] | Tensor, mask: Tensor | None = None) -> Tensor:
    if not isinstance(k, Tensor):
        k = to_device(host_counts(k, len(scores)), scores.device)
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    _launch(scores, k, mask, chosen, 0)
    return chosen


@torch.no_grad()
def topk_indices(scores: Tensor, k: int | Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    counts = host_counts(k, len(scores))
    width = max(counts, default=0)
    index = torch.zeros(len(scores), width, dtype=torch.int64, device=scores.device)
    found = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    _launch(scores, to_device(counts, scores.device), mask, index, width, found)
    return index, torch.arange(width, device=scores.device) < found[:, None]


def _launch(
    scores: Tensor, k: Tensor, mask: Tensor | None, out: Tensor, width: int, found: Tensor | None = None
) -> None:
    rows, n = scores.shape
    if n > LONGEST or not scores.is_floating_point() or scores.numel() == 0:
        raise NotServed(f"{n} scores a row of {scores.dtype}: 1 to {LONGEST} floats are served")
    scores = scores.contiguous() if scores.dtype == torch.float64 else scores.float().contiguous()
    block = triton.next_power_of_2(n)
    _topk[(rows,)](
        scores,
        k.contiguous(),
        scores if mask is None else mask.contiguous(),
        out,
        out if found is None else found,
        n,
        width,
        BITS=8 * scores.element_size(),
        MASKED=mask is not None,
        INDICES=found is not None,
        BLOCK=block,
        num_warps=min(16, max(4, block // 256)),
    )


@triton.jit
def _topk(
    scores,
    k,
    mask,
    out,
    found,
    n,
    width,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(scores + row * n + at, mask=at < n, other=0.0)
    candidate = at < n
    if MASKED:
        candidate = candidate & tl.load(mask + row * n + at, mask=at < n, other=0).to(tl.int1)
    wanted = tl.load(k + row)

    # Unsigned numbers in the order of the scores: -0.0 is 0.0, NaN below every number, what is no candidate is 0.
    if BITS == 32:
        key = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        key = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    else:
        key = tl.where(score == 0, 0.0, score).to(tl.int64, bitcast=True)
        key = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.uint64, bitcast=True) ^ 0x8000000000000000
    key = tl.where(candidate, tl.where(score != score, 1, key), 0).to(key.dtype)

    # The largest number that `wanted` of the keys, or more, reach: the lowest chosen key. 0 if there are fewer.
    least = tl.zeros((), key.dtype)
    bit = tl.full((), 1 << (BITS - 1), key.dtype)
    for _ in range(BITS):
        reached = tl.sum((key >= (least | bit)).to(tl.int32), 0) >= wanted
        least = tl.where(reached, least | bit, least)
        bit = bit >> 1
    above = key > least
    level = candidate & (key == least)
    room = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))

    if INDICES:
        slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out + row * width + slot, at.to(tl.int64), mask=chosen)
        tl.store(found + row, tl.sum(chosen.to(tl.int64), 0))
    else:
        tl.store(out + row * n + at, chosen, mask=at < n)
