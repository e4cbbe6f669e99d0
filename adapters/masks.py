"""Attention masks over sequences and caches that have lost columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prune.errors import InputError
from prune.kernels.compaction import take


@dataclass
class CallerMask:
    """The caller's `attention_mask`, taken apart.

    Args:
        new: `[B, q]` bool validity of the new columns.
        past: `[B, past]` bool validity of the logical columns before them.
        custom: the caller's own 4-D mask `[B or 1, H, q, past + q]`, if it is one; None otherwise.
        given: False if there was no mask, so that all columns are valid without looking.
        tells_past: True if `past` is the caller's word and not just assumed to be all valid.
    """

    new: Tensor
    past: Tensor
    custom: Tensor | None = None
    given: bool = True
    tells_past: bool = False

    @cached_property
    def counts(self) -> list[int]:
        """Valid new columns of every row; asks the device only if the caller gave a mask."""
        batch, q = self.new.shape
        return self.new.sum(1).tolist() if self.given else [q] * batch

    @property
    def new_full(self) -> bool:
        """Whether all new columns are valid."""
        return min(self.counts, default=0) == self.new.shape[1]

    @cached_property
    def past_full(self) -> bool:
        """Whether all earlier columns are valid."""
        return not self.tells_past or bool(self.past.all())


def take_apart(mask, batch: int, q: int, past: int, device: torch.device, static: bool) -> CallerMask:
    """Read any mask transformers accepts: None, 2-D, 4-D, or a dict of 4-D masks by layer type.

    For static caches `generate` makes 4-D masks whose columns are physical slots: at the first prefill only their
    padding matters; later ones say nothing a pruned cache does not know.

    Raises:
        InputError: a flex-attention BlockMask made by the caller.
    """

    def ones(n: int) -> Tensor:
        return torch.ones(batch, n, dtype=torch.bool, device=device)

    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return CallerMask(ones(q), ones(past), given=False)
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask of type {type(mask).__name__} cannot be pruned; pass a 2-D or 4-D tensor")
    mask = mask.to(device)
    if mask.dim() == 2:
        mask = mask.bool()
        if mask.shape[1] < past + q:
            return CallerMask(mask[:, -q:], ones(past))
        return CallerMask(mask[:, past : past + q], mask[:, :past], tells_past=past > 0)
    if static and past:
        return CallerMask(ones(q), ones(past), given=False)
    # A column is padding if no query may see it; what a custom mask hides from some, it goes on hiding itself.
    seen = _allowed(mask[:, 0, :, past : past + q]).any(1).expand(batch, -1)
    return CallerMask(seen, ones(past), None if static else mask)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def gather_custom(mask: Tensor, rows: Tensor, columns: Tensor, valid: Tensor) -> Tensor:
    """The caller's 4-D mask as the pruned layer needs it.

    Args:
        mask: `[B or 1, H, q, logical]`.
        rows: `[B, q']` surviving query rows.
        columns: `[B, kv]` logical column of every physical slot.
        valid: `[B, kv]` bool.
    """
    mask = mask.expand(len(rows), *mask.shape[1:])
    mask = take(mask.transpose(1, 2), rows).transpose(1, 2)
    mask = take(mask.movedim(3, 1), columns).movedim(1, 3)
    valid = valid[:, None, None]
    return mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, torch.finfo(mask.dtype).min)
