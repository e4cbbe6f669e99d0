"""Attention weights as numbers to rank by: some rows, or sums over all rows, never all rows of all heads at once.

Everything is in fp32 whatever the inputs are, and grouped-query aware: `H` query heads share `Hkv` key heads in order,
`H / Hkv` each. Sequences have the length `L` in dimension 1 and the heads in dimension 2, as projections give them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce

import torch
from torch import Tensor

from .dispatch import dispatched

ELEMENTS = 1 << 26
"""Attention weights `row_attention` should be asked for at a time: 256 MiB of fp32."""
TILES = {"cuda": 1 << 24}
TILE = 1 << 18
"""Weights held at a time where they are summed, on CUDA 64 MiB of fp32, elsewhere 1 MiB: what a core's cache holds."""
HELD = 1 << 24
"""Weights of one head that `attention_pagerank` keeps between iterations, at most."""
HIDDEN = -1e30
"""Added to the logits of what a row may not see. Finite, so that a row that sees nothing is uniform and not NaN."""


def attention_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Scaled products of queries and keys.

    Args:
        q: `[S, R, H, d]`, any R rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the products.
        mask: `[S or 1, R or 1, L]` bool, True where a row may look; other entries become -inf. None shows all.

    Returns:
        `[S, H, R, L]` fp32. Cost: O(S R L H d).
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = _products(q.float(), k.float().permute(0, 2, 3, 1)) * scale
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


@dispatched
def row_attention(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of some query rows, `[S, H, R, L]` fp32; arguments as in `attention_logits`.

    A row that may look nowhere gets zeros. Cost: O(S R L H d). Bytes moved in Triton: q, the result, and k twice in its
    own dtype; torch also writes k and the logits in fp32.
    """
    weights = attention_logits(q, k, scale, mask).softmax(-1)
    return weights if mask is None else weights.nan_to_num(0.0)


@dispatched
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
    """Attention every column receives, mean over the query rows and heads.

    Args:
        q: `[S, L, H, d]`; `[P, H, d]` with `cu_seqlens`.
        k: `[S, L, Hkv, d]`; `[P, Hkv, d]` with `cu_seqlens`.
        scale: factor of the logits.
        valid: `[S, L]` bool; columns that are not valid neither look nor are looked at. None means all are.
        mask: `[S or 1, L, L]` bool, True where a row may look, beside `valid` and `causal`.
        causal: rows look at themselves and what is before them only.
        cu_seqlens: `[segments + 1]` integers from 0 to P, ascending: packed sequences of any lengths, each of which
            attends to itself. Excludes `valid` and `mask`.
        chunk: query rows at a time, at most.

    Returns:
        `[S, L]` or `[P]` fp32; sums to 1 over the valid columns of a sequence if each of them may look somewhere. What
        masked places hold, NaN included, has no influence.

    Raises:
        ValueError: `cu_seqlens` beside `valid` or `mask`.

    Cost: O(S L^2 H d), twice that in Triton (row log-sum-exp, then column sums). Memory at L = 16384: about 200 MiB in
    torch on CUDA, 20 MiB on CPU, `[S, H, L]` fp32 twice in Triton. Bytes moved in Triton: q or k once per tile of the
    other, and these two. With `cu_seqlens` torch reads the lengths on the host and works through them length by
    length, without padding; Triton does neither.
    """
    if cu_seqlens is not None:
        if valid is not None or mask is not None:
            raise ValueError("cu_seqlens says what is valid: give no valid and no mask beside it")
        run = lambda q, k: received_attention(q, k, scale, causal=causal, chunk=chunk)  # noqa: E731
        return by_segment(run, cu_seqlens, q, k)
    total = column_attention(q, k, scale, valid, valid, causal_ends(q) if causal else None, mask, chunk).mean(1)
    return total / (q.shape[1] if valid is None else valid.sum(1, keepdim=True).clamp(min=1))


@dispatched
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
    """Importance that flows along attention: a distribution over columns, multiplied by the attention matrix.

    Every head starts from the uniform distribution over the valid columns, as a row vector, and is multiplied
    `iterations` times by its own softmax attention matrix.

    Args:
        q, k, scale, valid, mask, causal, chunk: as in `received_attention`.
        iterations: at least 0.
        temperature: the logits are divided by it. The defaults of both are those of AIM (arXiv 2412.03248).

    Returns:
        `[S, L]` fp32, the root mean square over heads.

    Cost: where the matrix of one head has no more than `HELD` weights and no chunk is given, O(S L^2 H d) once and
    O(S L^2 H) an iteration, head by head; otherwise, and in Triton, the matrix is made anew in every iteration. Bytes
    moved in torch: q and k in fp32, and the S H L^2 weights, made once and read in every iteration, or made in every
    one; in Triton once for the log-sum-exp and once an iteration q or k once per tile of the other, and `[S, H, L]`
    fp32 up to three times.
    """
    sequences, length, heads, _ = q.shape
    rank = start_of_pagerank(q, valid)[:, :, None]
    tiles = partial(_tiles, q, k, scale / temperature, valid, valid, causal_ends(q) if causal else None, mask)
    with torch.autocast(q.device.type, enabled=False):
        if chunk is None and length**2 <= HELD:
            for s, h, _, weights, counts in tiles(length) if iterations else ():
                for _ in range(iterations):
                    rank[s, h] = _weighted(rank[s, h], counts) @ weights
        else:
            for _ in range(iterations):
                flowed = torch.zeros_like(rank)
                for s, h, rows, weights, counts in tiles(1, chunk):
                    flowed[s, h] += _weighted(rank[s, h, :, rows], counts) @ weights
                rank = flowed
    return rank[:, :, 0].square().mean(1).sqrt()


def _weighted(rank: Tensor, counts: Tensor | None) -> Tensor:
    return rank if counts is None else rank * counts[:, None, None]


def start_of_pagerank(q: Tensor, valid: Tensor | None) -> Tensor:
    """`[S, H, L]` fp32: every head's uniform distribution over the valid columns of queries `[S, L, H, d]`."""
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    return (valid.float() / valid.sum(1, keepdim=True).clamp(min=1))[:, None].repeat(1, q.shape[2], 1)


def causal_ends(q: Tensor) -> Tensor:
    """`[1, L]`: the first column that no row of `[S, L, H, d]` may see, if rows see what is before them only."""
    return torch.arange(1, q.shape[1] + 1, device=q.device)[None]


def column_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    ends: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Softmax attention of some rows to every column, summed over the rows, for every head.

    Args:
        q: `[S, R, H, d]`, any R rows.
        k: `[S, L, Hkv, d]`.
        scale: factor of the logits.
        rows: `[S, R]` bool, the rows that count; None means all.
        columns: `[S, L]` bool, the columns that can be looked at; None means all.
        ends: `[S or 1, R]` int64, the first column a row may not see; None shows all.
        mask: `[S or 1, R or 1, L]` bool, where a row may look, beside all that.
        chunk: rows at a time, at most.

    Returns:
        `[S, H, L]` fp32. A row that may look nowhere adds nothing. Cost: O(S R L H d); memory for a few tiles.
    """
    total = torch.zeros(len(q), q.shape[2], k.shape[1], dtype=torch.float32, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for s, h, _, weights, counts in _tiles(q, k, scale, rows, columns, ends, mask, 1, chunk):
            total[s, h] += (weights if counts is None else weights.mul_(counts[:, None, :, None])).sum(2)
    return total


def by_segment(kernel: Callable[..., Tensor], cu_seqlens: Tensor, *packed: Tensor | None) -> Tensor:
    """Run a kernel of sequences `[S, L, ...]` on packed ones, together on those of the same length: no padding.

    Args:
        kernel: `[S, L, ...]` each (None stays None) -> `[S, L]`.
        cu_seqlens: as in `received_attention`. Read on the host: one synchronisation.
        packed: `[P, ...]` each.

    Returns:
        `[P]`, of the kernel's dtype (fp32 where there is no segment).
    """
    bounds = cu_seqlens.tolist()
    starts: dict[int, list[int]] = {}
    for start, end in zip(bounds, bounds[1:]):
        if end > start:
            starts.setdefault(end - start, []).append(start)
    device = packed[0].device
    found = torch.zeros(len(packed[0]), dtype=torch.float32, device=device)
    for length, begins in starts.items():
        if len(begins) == 1:  # a view
            index = slice(begins[0], begins[0] + length)
            parts = (None if x is None else x[index][None] for x in packed)
            found[index] = kernel(*parts)[0]
        else:
            index = torch.tensor(begins).to(device, non_blocking=True)[:, None] + torch.arange(length, device=device)
            parts = (None if x is None else x[index] for x in packed)
            found[index] = kernel(*parts)
    return found


def _tiles(
    q: Tensor,
    k: Tensor,
    scale: float,
    rows: Tensor | None,
    columns: Tensor | None,
    ends: Tensor | None,
    mask: Tensor | None,
    least: int = 1,
    chunk: int | None = None,
) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor | None]]:
    """(sequences, heads, rows, softmax `[s, h, r, L]` to be changed at will, factor `[s, r]` of its rows or None).

    Rows that do not count, or may look nowhere, hold anything finite and have the factor 0.

    Args:
        q, k, scale, rows, columns, ends, mask: as in `column_attention`.
        least: rows of a tile at least, whatever its size.
        chunk: rows of a tile at most.
    """
    sequences, count, heads, _ = q.shape
    length, group = k.shape[1], heads // k.shape[2]
    if mask is not None:  # what nobody sees may hold NaN
        rows = mask.any(2) if rows is None else rows & mask.any(2)
        columns = mask.any(1) if columns is None else columns & mask.any(1)
    rows = None if rows is None else rows.expand(sequences, count)
    columns = None if columns is None else columns.expand(sequences, length)
    most = TILES.get(q.device.type, TILE)
    r = max(1, min(count, chunk or count, max(least, most // max(1, length))))
    h = min(heads, most // max(1, r * length))
    h = h // group * group or 1  # whole groups, or one head
    s = max(1, min(sequences, most // max(1, h * r * length))) if h == heads and r == count else 1
    few = count * group < q.shape[3]  # then logits are fewer than numbers in the keys, which stay as they are
    for i in range(0, sequences, s):
        some = slice(i, i + s)
        for j in range(0, heads, h):
            part = slice(j, j + h)
            keys = k[some, :, j // group : (j + h - 1) // group + 1].float()
            if columns is not None and not few:
                keys = keys.masked_fill(~columns[some, :, None, None], 0)
            keys = keys.permute(0, 2, 3, 1)
            for start in range(0, count, r):
                span = slice(start, start + r)
                queries = q[some, span, part].float() * scale
                if rows is not None:
                    queries = queries.masked_fill(~rows[some, span, None, None], 0)
                logits = _products(queries, keys)
                counts = None if rows is None else rows[some, span].float()
                hidden = _hidden(some, span, length, columns, ends, mask)
                if hidden is not None:
                    if few:
                        logits.masked_fill_(hidden[:, None] < 0, HIDDEN)
                    else:
                        logits.add_(hidden[:, None])  # ten times as fast
                    looks = (hidden.amax(-1) == 0).float().expand(len(logits), logits.shape[2])
                    counts = looks if counts is None else counts * looks
                yield some, part, span, logits.softmax(-1), counts


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """`[s, H, r, L]` of queries `[s, r, H, d]` and keys `[s, Hkv, d, L]`."""
    sequences, rows, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.view(sequences, rows, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(sequences, kv_heads, heads // kv_heads * rows, dim)
    return (grouped @ keys).view(sequences, heads, rows, keys.shape[-1])


def _hidden(
    some: slice, span: slice, length: int, columns: Tensor | None, ends: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """`[s or 1, r or 1, L]` fp32 to add to the logits of these sequences and rows; None if they see everything."""
    parts = []
    if columns is not None:
        parts.append(columns[some, None])
    if ends is not None:
        end = (ends if len(ends) == 1 else ends[some])[:, span, None]
        parts.append(torch.arange(length, device=ends.device) < end)
    if mask is not None:
        mask = mask if len(mask) == 1 else mask[some]
        parts.append(mask if mask.shape[1] == 1 else mask[:, span])
    return (~reduce(torch.logical_and, parts)).float().mul_(HIDDEN) if parts else None
