"""Attention of rows to columns from tiles of q and k: row log-sum-exp first, then weights or their sums over the rows.

Both kernels walk over tiles of products `[ROWS, COLUMNS]` whose width, one head, is held whole. A row sees the columns
from its `begin` to before its `end` that are `valid`, and where `mask` says so; tiles outside of all ranges are passed
over. Exponents are to the base 2. The log-sum-exp of a row that sees nothing is +inf, so that its weights are 0. The
logits of hidden places are replaced, not added to: what lies there is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune.kernels.attention import causal_ends, start_of_pagerank
from prune.kernels.dispatch import NotServed

from .blocks import WIDEST, blocks, check


# ---------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _load(x, places, stride, count, width, INNER: tl.constexpr, WIDEN: tl.constexpr):
    """Rows `[len(places), INNER]` of a matrix, 0 outside of it."""
    inner = tl.arange(0, INNER)
    inside = (places < count)[:, None] & (inner < width)[None, :]
    found = tl.load(x + places[:, None].to(tl.int64) * stride + inner[None, :], inside, other=0.0)
    return found.to(tl.float32) if WIDEN else found


@triton.jit
def _logits(
    queries, keys, rows, columns, begin, end, valid, mask, mask_r, mask_l, count, length, scale,
    RANGED: tl.constexpr, VALID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, to the base 2; -inf where a row may not see."""
    logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    seen = (rows < count)[:, None] & (columns < length)[None, :]
    if MASKED:
        at = mask + rows[:, None].to(tl.int64) * mask_r + columns[None, :] * mask_l
        seen = seen & (tl.load(at, seen, other=0) != 0)
    if RANGED:
        seen = seen & (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    if VALID:
        seen = seen & (tl.load(valid + columns, columns < length, other=0) != 0)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _rows_kernel(
    q, q_s, q_r, q_h, k, k_s, k_l, k_h, begin, begin_s, end, end_s, valid, valid_s, mask, mask_s, mask_r, mask_l,
    count, length, width, group, scale, out,
    RANGED: tl.constexpr, VALID: tl.constexpr, MASKED: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows, a head, a sequence.

    Writes the log-sum-exp of the rows to `out` `[S, H, R]`, or with STORE their weights to `out` `[S, H, R, L]`.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, s = tl.program_id(1), tl.program_id(2).to(tl.int64)
    queries = _load(q + s * q_s + h * q_h, rows, q_r, count, width, INNER, WIDEN)
    k += s * k_s + (h // group) * k_h
    valid += s * valid_s
    mask += s * mask_s
    first, last, left, right = rows, rows, 0, length
    if RANGED:
        first = tl.load(begin + s * begin_s + rows, rows < count, other=0)
        last = tl.load(end + s * end_s + rows, rows < count, other=0)
        left = tl.min(tl.where(last > first, first, length)) // COLUMNS * COLUMNS
        right = tl.max(last)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(left, right, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        keys = _load(k, columns, k_l, length, width, INNER, WIDEN)
        logits = _logits(
            queries, keys, rows, columns, first, last, valid, mask, mask_r, mask_l, count, length, scale,
            RANGED, VALID, MASKED,
        )  # fmt: skip
        higher = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        largest = higher
    lse = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    place = (s * tl.num_programs(1) + h) * count + rows
    if STORE:
        for start in range(0, length, COLUMNS):  # every column, since what nobody sees must be written too
            columns = start + tl.arange(0, COLUMNS)
            keys = _load(k, columns, k_l, length, width, INNER, WIDEN)
            logits = _logits(
                queries, keys, rows, columns, first, last, valid, mask, mask_r, mask_l, count, length, scale,
                RANGED, VALID, MASKED,
            )  # fmt: skip
            inside = (rows < count)[:, None] & (columns < length)[None, :]
            tl.store(out + place[:, None] * length + columns[None, :], tl.exp2(logits - lse[:, None]), inside)
    else:
        tl.store(out + place, lse, rows < count)


@triton.jit
def _columns_kernel(
    q, q_s, q_r, q_h, k, k_s, k_l, k_h, begin, begin_s, end, end_s, valid, valid_s, mask, mask_s, mask_r, mask_l,
    count, length, width, group, scale, lse, factor, out,
    RANGED: tl.constexpr, VALID: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: a block of columns, a head, a sequence.

    Writes the sum over the rows of their weights, times `factor` `[S, H, R]` if WEIGHTED, to `out` `[S, H, L]`.
    """
    start = tl.program_id(0) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    h, s = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = _load(k + s * k_s + (h // group) * k_h, columns, k_l, length, width, INNER, WIDEN)
    q += s * q_s + h * q_h
    valid += s * valid_s
    mask += s * mask_s
    at = s * tl.num_programs(1) + h
    received = tl.zeros([COLUMNS], tl.float32)
    for block in range(0, count, ROWS):
        rows = block + tl.arange(0, ROWS)
        first, last, meets = rows, rows, True
        if RANGED:
            first = tl.load(begin + s * begin_s + rows, rows < count, other=0)
            last = tl.load(end + s * end_s + rows, rows < count, other=0)
            meets = tl.max(tl.where((last > start) & (first < start + COLUMNS), 1, 0)) > 0
        if meets:
            queries = _load(q, rows, q_r, count, width, INNER, WIDEN)
            logits = _logits(
                queries, keys, rows, columns, first, last, valid, mask, mask_r, mask_l, count, length, scale,
                RANGED, VALID, MASKED,
            )  # fmt: skip
            weights = tl.exp2(logits - tl.load(lse + at * count + rows, rows < count, other=float("inf"))[:, None])
            if WEIGHTED:
                weights *= tl.load(factor + at * count + rows, rows < count, other=0.0)[:, None]
            received += tl.sum(weights, 0)
    tl.store(out + at * length + columns, received, columns < length)


# ---------------------------------------------------------------------------------------------------------- launches
@dataclass
class Attention:
    """Who looks at whom; see the head of this file.

    Args:
        q: `[S, R, H, d]`.
        k: `[S, L, Hkv, d]`, of the same dtype.
        scale: factor of the logits.
        begin, end: `[S or 1, R]` int32; None for both shows all.
        valid: `[S or 1, L]` bool or None.
        mask: `[S or 1, R or 1, L]` bool or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    begin: Tensor | None = None
    end: Tensor | None = None
    valid: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self):
        check(self.q, self.k)
        if self.q.shape[-1] > WIDEST:
            raise NotServed(f"heads of {self.q.shape[-1]} numbers: up to {WIDEST} are served")
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k))
        self.blocks = blocks(self.q, self.q.shape[1], self.q.shape[3])

    def arguments(self) -> list:
        q, k, sequences = self.q, self.k, len(self.q)
        rows, columns = (sequences, q.shape[1]), (sequences, k.shape[1])
        begin, end = (q if x is None else x.expand(rows) for x in (self.begin, self.end))
        valid = q if self.valid is None else self.valid.view(torch.uint8).expand(columns)
        mask = None if self.mask is None else self.mask.view(torch.uint8).expand(*rows, k.shape[1])
        return [
            *(q, *q.stride()[:3], k, *k.stride()[:3]),
            *(begin, begin.stride(0), end, end.stride(0), valid, valid.stride(0)),
            *((q, 0, 0, 0) if mask is None else (mask, *mask.stride())),
            *(q.shape[1], k.shape[1], q.shape[3], q.shape[2] // k.shape[2], self.scale * math.log2(math.e)),
        ]

    def switches(self) -> dict[str, bool]:
        return dict(RANGED=self.end is not None, VALID=self.valid is not None, MASKED=self.mask is not None)

    def lse(self) -> Tensor:
        """Log-sum-exp of the rows `[S, H, R]` fp32, to the base 2."""
        return self._rows(self.q.new_empty(self._by_head(), dtype=torch.float32), False)

    def weights(self) -> Tensor:
        """`[S, H, R, L]` fp32."""
        return self._rows(self.q.new_empty(*self._by_head(), self.k.shape[1], dtype=torch.float32), True)

    def sums(self, lse: Tensor, factor: Tensor | None = None) -> Tensor:
        """`[S, H, L]` fp32: the weights summed over the rows, times `factor` `[S, H, R]` fp32."""
        sequences, heads, _ = self._by_head()
        out = self.q.new_empty(sequences, heads, self.k.shape[1], dtype=torch.float32)
        grid = (triton.cdiv(self.k.shape[1], self.blocks.columns), heads, sequences)
        factor = None if factor is None else factor.contiguous()
        rest = self.switches() | dict(WEIGHTED=factor is not None) | self.blocks.launch()
        _columns_kernel[grid](*self.arguments(), lse, lse if factor is None else factor, out, **rest)
        return out

    def _by_head(self) -> tuple[int, int, int]:
        sequences, count, heads, _ = self.q.shape
        return sequences, heads, count

    def _rows(self, out: Tensor, store: bool) -> Tensor:
        sequences, heads, count = self._by_head()
        grid = (triton.cdiv(count, self.blocks.rows), heads, sequences)
        rest = self.switches() | dict(STORE=store) | self.blocks.launch()
        _rows_kernel[grid](*self.arguments(), out, **rest)
        return out


def between(end: Tensor, counts: Tensor | None, begin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Begin and end `[S or 1, R]` int32 of the rows that count; the others see nothing."""
    end = end if counts is None else torch.where(counts, end, 0)
    return (torch.zeros_like(end) if begin is None else begin).int(), end.int().contiguous()


def row_attention(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return Attention(q, k, scale, mask=mask).weights()


def received_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        if valid is not None or mask is not None:
            raise ValueError("cu_seqlens says what is valid: give no valid and no mask beside it")
        return _received_packed(q, k, scale, cu_seqlens, causal)
    found = _all_rows(q, k, scale, valid, mask, causal)
    total = found.sums(found.lse()).mean(1)
    return total / (q.shape[1] if valid is None else valid.sum(1, keepdim=True).clamp(min=1))


def _received_packed(q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor, causal: bool) -> Tensor:
    bounds = cu_seqlens.to(q.device)
    place = torch.arange(len(q), device=q.device, dtype=bounds.dtype)
    segment = torch.searchsorted(bounds, place, right=True)  # empty segments are stepped over
    begin, end = bounds[segment - 1], bounds[segment]
    ends = (place + 1 if causal else end)[None]
    found = Attention(q[None], k[None], scale, *between(ends, None, begin[None]))
    return found.sums(found.lse())[0].mean(0) / (end - begin)


def _all_rows(q: Tensor, k: Tensor, scale: float, valid: Tensor | None, mask: Tensor | None, causal: bool) -> Attention:
    ends = causal_ends(q) if causal else None
    if valid is not None:  # rows that are not valid must not look
        ends = torch.where(valid, q.shape[1] if ends is None else ends, 0)
    begin, end = (None, None) if ends is None else between(ends, None)
    return Attention(q, k, scale, begin, end, valid, mask)


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    iterations: int = 5,
    temperature: float = 0.1,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> Tensor:
    found = _all_rows(q, k, scale / temperature, valid, mask, causal)
    rank, lse = start_of_pagerank(q, valid), found.lse()
    for _ in range(iterations):
        rank = found.sums(lse, rank)
    return rank.square().mean(1).sqrt()
