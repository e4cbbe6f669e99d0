"""What a reader of golden cases yields, and how cases are put into one ragged batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from prune import Method, VisualTokens


@dataclass
class Check:
    """`method` must keep `expected` `[B, K]` of `tokens`, -1 for padding; `alone` says why it cannot be batched."""

    method: Method
    tokens: VisualTokens
    expected: Tensor
    alone: str = ""

    @property
    def lists(self) -> list[list[int]]:
        """The kept indices of every row."""
        return [[index for index in row if index >= 0] for row in self.expected.tolist()]

    @property
    def counts(self) -> list[int]:
        return [len(row) for row in self.lists]


def batch(parts: list[VisualTokens]) -> VisualTokens:
    """The rows of all parts in one batch: tokens padded with NaN or nonsense, channels (of other sizes) with zeros."""
    merged = {}
    for name in (f.name for f in fields(VisualTokens)):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            merged[name] = _stack(values)
        elif isinstance(values[0], dict):
            merged[name] = {key: _stack([value[key] for value in values]) for key in values[0]}
        elif values[0] is not None:
            raise TypeError(f"cases with {name} cannot be batched here: give the Check a reason in `alone`")
    return VisualTokens(**merged)


def _stack(values: list[Tensor]) -> Tensor:
    sizes = [max(value.shape[d] for value in values) for d in range(1, values[0].dim())]
    rows = []
    for value in values:
        filler = False if value.dtype == torch.bool else float("nan") if value.is_floating_point() else -5
        padded = value.new_full((len(value), *sizes), filler)
        padded[:, : value.shape[1]] = 0
        padded[tuple(slice(n) for n in value.shape)] = value
        rows.append(padded)
    return torch.cat(rows)
