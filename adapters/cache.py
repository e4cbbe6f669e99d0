"""What a pruned KV cache remembers, and how it answers for its length.

A pruned cache holds fewer columns than the conversation has tokens, and after in-decoder pruning not every layer
holds the same ones. `generate()` and position code must see the *logical* length, attention masks the *physical* one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prune.errors import CacheMismatchError

LEDGER = "_prune_ledger"
INTERRUPTED = "interrupted"


@dataclass
class Ledger:
    """Which slot holds which column, per group of layers between two pruning layers.

    It is constant while decoding - later slot j simply holds column j + offset - so decode steps update nothing,
    synchronise nothing and compile without graph breaks.

    Args:
        pruner: signature of the pruner that filled the cache.
        bounds: decoder layers at whose input tokens are dropped, ascending; group g lies after g of them.
        valid: per group, `[B, slots]` bool of the slots that existed at commit time; None if all are valid.
        columns: per group, `[B, slots]` int64 logical column of each of these slots.
        offset: per group, logical columns minus physical slots.
        delta: `[A, B]` int64 added to later position ids ("compact" positions), or None.
    """

    pruner: str
    bounds: tuple[int, ...]
    valid: list[Tensor | None]
    columns: list[Tensor]
    offset: list[int]
    delta: Tensor | None = None

    def group(self, layer: int) -> int:
        return sum(layer >= bound for bound in self.bounds)

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the batch rows."""
        pick = lambda t: None if t is None else t.index_select(0, index.to(t.device))  # noqa: E731
        self.valid, self.columns = [pick(t) for t in self.valid], [pick(t) for t in self.columns]
        if self.delta is not None:
            self.delta = self.delta.index_select(1, index.to(self.delta.device))

    def validity(self, group: int, slots: int) -> Tensor | None:
        """`[B, slots]` bool, or None if every slot is valid."""
        valid = self.valid[group]
        if valid is None:
            return None
        return valid[:, :slots] if valid.shape[1] >= slots else F.pad(valid, (0, slots - valid.shape[1]), value=True)

    def logical(self, group: int, slots: int) -> Tensor:
        """`[B, slots]` logical column of every slot."""
        known = self.columns[group][:, :slots]
        later = torch.arange(known.shape[1], slots, device=known.device) + self.offset[group]
        return torch.cat([known, later.expand(known.shape[0], -1)], 1)

    def check_crop(self, cache, count: int) -> None:
        """Whether the last `count` slots of every layer are the last `count` tokens of the conversation.

        Raises:
            CacheMismatchError: tokens were dropped there, so that slots and tokens do not correspond.
        """
        for group, bound in enumerate((0, *self.bounds)):
            slots = slots_of(cache, bound)
            first, known = slots - count, self.columns[group].shape[1]
            if first < known and (
                first < 0 or bool((self.columns[group][:, first] != first + self.offset[group]).any())
            ):
                raise CacheMismatchError(
                    f"crop({-count}) reaches back to pruned image tokens, which the cache does not hold; crop less, or "
                    "start again with a fresh cache (past_key_values=None)"
                )


class LogicalLengthMixin:
    """Mixed into a cache's class when it is first pruned: `get_seq_length` counts the conversation's tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        ledger = ledger_of(self)
        slots = super().get_seq_length(layer_idx)
        return slots if ledger is None else slots + ledger.offset[ledger.group(layer_idx)]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    def reset(self):
        super().reset()
        self.__dict__.pop(LEDGER, None)

    def crop(self, tokens_to_remove: int) -> None:
        if (ledger := ledger_of(self)) is not None and tokens_to_remove:
            ledger.check_crop(self, abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if (ledger := ledger_of(self)) is not None:
            self._select(torch.arange(ledger.columns[0].shape[0]).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        if (ledger := ledger_of(self)) is not None:
            ledger.select(index)


_CLASSES: dict[type, type] = {}


def _pruned_class(cls: type) -> type:
    if issubclass(cls, LogicalLengthMixin):
        return cls
    if cls not in _CLASSES:
        name = f"Pruned{cls.__name__}"
        _CLASSES[cls] = type(name, (LogicalLengthMixin, cls), {"__module__": __name__})
        globals().setdefault(name, _CLASSES[cls])  # where pickle looks for it
    return _CLASSES[cls]


def __getattr__(name: str):
    """Let pickle find `Pruned<Class>` in a process that has not pruned a cache of that class yet."""
    if name.startswith("Pruned"):
        from transformers import cache_utils

        base = getattr(cache_utils, name.removeprefix("Pruned"), None)
        if isinstance(base, type) and issubclass(base, cache_utils.Cache):
            return _pruned_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def ledger_of(cache) -> Ledger | None:
    """The ledger of a cache, None if it was never pruned (or there is no cache)."""
    ledger = None if cache is None else cache.__dict__.get(LEDGER)
    return ledger if isinstance(ledger, Ledger) else None


def check(cache, pruner: str, batch: int) -> None:
    """Refuse a cache that cannot be continued.

    Raises:
        CacheMismatchError: a forward that was filling it was interrupted, another pruner filled it, or the batch
            size changed.
    """
    if cache is None:
        return
    fix = "start again with a fresh cache (past_key_values=None)"
    if cache.__dict__.get(LEDGER) == INTERRUPTED:
        raise CacheMismatchError(f"the forward that was filling this cache was interrupted; {fix}")
    ledger = ledger_of(cache)
    if ledger is None:
        return
    if ledger.pruner != pruner:
        raise CacheMismatchError(f"this cache was filled under {ledger.pruner}, not under {pruner}; {fix}")
    if ledger.columns[0].shape[0] != batch:
        raise CacheMismatchError(
            f"this cache holds {ledger.columns[0].shape[0]} sequences, the inputs {batch}; {fix}, or use "
            "cache.batch_repeat_interleave / batch_select_indices"
        )
    last = len(cache.layers) - 1
    if not cache.is_compileable and cache.get_seq_length(0) != cache.get_seq_length(last):
        raise CacheMismatchError(f"the layers of this cache hold different lengths (a step was interrupted); {fix}")


def slots_of(cache, layer: int) -> int:
    """Physical length of one layer."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.layers[layer].get_seq_length())


def mark_interrupted(cache) -> None:
    """To be called before a forward that prunes: only `commit` and `cache.reset()` clear it."""
    if cache is not None:
        cache.__class__ = _pruned_class(type(cache))
        cache.__dict__[LEDGER] = INTERRUPTED


def commit(cache, ledger: Ledger) -> None:
    """Store the ledger and make the cache answer with its logical length."""
    cache.__class__ = _pruned_class(type(cache))
    cache.__dict__[LEDGER] = ledger
