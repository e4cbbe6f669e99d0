"""Graphs of similar tokens, their edges computed from cosines in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import dispatched
from .similarity import unit

ELEMENTS = 1 << 26
"""Edge weights held at a time: 256 MiB of fp32."""


@dispatched
@torch.no_grad()
def propagate(
    x: Tensor,
    start: Tensor,
    group: Tensor,
    mask: Tensor,
    threshold: float,
    temperature: float,
    iterations: int,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Let every token hand what it holds to its neighbours, several times.

    Neighbours are tokens of the same group with cosine `threshold` or more, the token itself among them. Row i of the
    transition matrix A is the softmax of cosine / temperature over its neighbours.

    Args:
        x: `[B, N, D]` float; everything in fp32.
        start: `[B, N]`, what tokens hold at first. Values at padding are ignored.
        group: `[B, N]` int64.
        mask: `[B, N]` bool. What the other tokens hold, NaN included, has no influence.
        threshold: a cosine.
        temperature: > 0.
        iterations: how often, at least 1.
        chunk: rows of A at a time; None takes as many as `ELEMENTS` allows.

    Returns:
        `start @ A ** iterations` `[B, N]` fp32, and `[B, N]` int64 how many entries of every row of A are not 0 in
        fp32. A token without a direction (a zero vector) keeps to itself; padding gets 0 and degree 0.

    Cost: where A fits into `ELEMENTS`, O(B N^2 D) once and O(B N^2) an iteration; otherwise A is computed anew in
        every iteration, O(B N^2 D) each. Triton does the same with the logits of A: from tiles of x in its own
        dtype, one launch for them and for the log-sum-exp of the rows, one for every iteration. Bytes moved in torch:
        some ten passes over A in fp32 to make it, and one an iteration; in Triton the logits of A written once and read
        in every iteration, or, where they do not fit, x once per tile of itself in each.
    """
    rows, n, _ = x.shape
    x = unit(x, 1e-12).masked_fill(~mask[..., None], 0)
    held = start.float().masked_fill(~mask, 0)
    chunk = chunk or max(1, ELEMENTS // max(1, rows * n))
    spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    blocks = _blocks(x, group, mask, threshold, temperature, spans)
    if fits := len(spans) == 1:
        blocks = list(blocks)
    degree = torch.zeros_like(group)
    for step in range(iterations):
        flowed = torch.zeros_like(held)
        for span, weights in blocks:
            with torch.autocast(x.device.type, enabled=False):
                flowed += (held[:, None, span] @ weights)[:, 0]
            if step == 0:
                degree[:, span] = (weights > 0).sum(-1)
        held = flowed
        blocks = blocks if fits else _blocks(x, group, mask, threshold, temperature, spans)
    return held, degree


def _blocks(
    x: Tensor, group: Tensor, mask: Tensor, threshold: float, temperature: float, spans: list[slice]
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows of A `[B, rows, N]`)."""
    place = torch.arange(x.shape[1], device=x.device)
    for span in spans:
        with torch.autocast(x.device.type, enabled=False):
            cosine = x[:, span] @ x.transpose(1, 2)
        near = (cosine >= threshold) & (group[:, span, None] == group[:, None])
        edge = (near | (place[span, None] == place)) & mask[:, span, None] & mask[:, None]
        logits = (cosine / temperature).masked_fill(~edge, -torch.inf)
        yield span, logits.softmax(-1).nan_to_num(0.0)  # padding has no edge at all


@torch.no_grad()
def bipartite(
    x: Tensor, group: Tensor, mask: Tensor, threshold: float, chunk: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """How similar every token is to the tokens of its group on the other side: even places against odd ones.

    Args:
        x: `[B, N, D]` float; cosines in fp32.
        group, mask: as in `propagate`.
        threshold: cosine from which on two tokens share an edge.
        chunk: even tokens compared at a time.

    Returns:
        `[B, N]` each: number of edges (int64), mean cosine of the edges and mean cosine of all pairs (fp32); 0 where
        there is nothing to average.

    Cost: one product of N / 2 x N / 2 pairs, O(N^2 D / 4), in chunks.
    """
    x = unit(x).masked_fill(~mask[..., None], 0)
    odd = slice(1, None, 2)
    edges, pairs = torch.zeros_like(group), torch.zeros_like(group)
    near, total = x.new_zeros(group.shape), x.new_zeros(group.shape)
    for start in range(0, x.shape[1], 2 * chunk):
        rows = slice(start, start + 2 * chunk, 2)
        with torch.autocast(x.device.type, enabled=False):
            cosine = x[:, rows] @ x[:, odd].transpose(1, 2)
        pair = (group[:, rows, None] == group[:, None, odd]) & mask[:, rows, None] & mask[:, None, odd]
        edge = pair & (cosine >= threshold)
        for out, value in ((edges, edge), (pairs, pair), (near, cosine * edge), (total, cosine * pair)):
            out[:, rows] += value.sum(2)
            out[:, odd] += value.sum(1)
    return edges, near / edges.clamp(min=1), total / pairs.clamp(min=1)
