"""The nearest tokens of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import ELEMENTS
from .dispatch import dispatched
from .similarity import EPS, unit


@dispatched
@torch.no_grad()
def cosine_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    x_group: Tensor,
    y_group: Tensor,
    own: Tensor | None = None,
    chunk: int | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The `k` tokens of `y` with the largest cosine to every token of `x`, among those of its group.

    Args:
        x: `[B, N, D]` float.
        y: `[B, M, D]` float. What tokens of other groups hold, NaN included, has no influence.
        k: at most M are returned.
        x_group, y_group: `[B, N]` and `[B, M]` int64: only tokens of equal numbers are compared. A negative number in
            `y_group` hides a token, as padding.
        own: `[B, N]` int64, of every token of `x` a place in `y` that is left out: itself.
        chunk: tokens of `x` at a time; None takes as many as `ELEMENTS` allows.
        eps: as in `unit`.

    Returns:
        `index` `[B, N, k]` int64, nearest first, ties to the lowest, and `cosine` `[B, N, k]` fp32, -inf (at index 0)
        where there are no more.

    Cost: O(N M D), one matrix product, and sorting N rows of M, in chunks; in Triton (k up to 64) tiles of products are
        sorted where they are made. Bytes moved in torch: x and y in fp32, N M cosines written, masked and sorted with
        their int64 places; in Triton x and y in their own dtype once per tile of the other, and `[B, N, k]` twice.
    """
    x, y, k = unit(x, eps), unit(y, eps), min(k, y.shape[1])
    chunk = chunk or max(1, ELEMENTS // max(1, y.shape[0] * y.shape[1]))
    own = torch.full(x.shape[:2], -1, device=x.device) if own is None else own
    place, found = torch.arange(y.shape[1], device=x.device), []
    for rows, group, self in zip(*(part.split(chunk, 1) for part in (x, x_group, own))):
        with torch.autocast(x.device.type, enabled=False):
            cosine = rows @ y.mT
        apart = (group[..., None] != y_group[:, None]) | (y_group < 0)[:, None] | (self[..., None] == place)
        cosine.masked_fill_(apart.logical_or_(cosine.isnan()), -torch.inf)
        best, index = (part[..., :k] for part in cosine.sort(dim=-1, descending=True, stable=True))
        found.append((index.masked_fill(best == -torch.inf, 0), best))
    index, cosine = (torch.cat(parts, 1) for parts in zip(*found))
    return index, cosine
