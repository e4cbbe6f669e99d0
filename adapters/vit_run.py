"""One forward of a vision transformer: which patches are alive, what they stand for, and how a stage cuts them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prune.adapters.vit_heads import Captured
from prune.errors import InputError
from prune.kernels.compaction import take
from prune.method import Reducer, Site
from prune.tokens import Reduction


@dataclass
class BlockCut:
    """One stage: `keep` patches of every image are left."""

    site: Site
    reducer: Reducer
    keep: int


@dataclass
class Done:
    """A cut that was made.

    Args:
        site: where.
        index: `[B, K]` original number of every patch left; `valid` `[B, K]` or None (all).
        into: `[B, N]` the slot every patch that entered went to, -1 for those dropped.
        reducer, before, after: the stage and the patches `[B, N or K, D]` around it; None unless to be restored.
    """

    site: Site
    index: Tensor
    valid: Tensor | None
    into: Tensor
    reducer: Reducer | None = None
    before: Tensor | None = None
    after: Tensor | None = None

    def undo(self, now: Tensor) -> Tensor:
        """`[B, K, D]` -> `[B, N, D]`: merged patches get a copy of their group, dropped ones what they were."""
        if self.reducer.reconstructs:
            return self.reducer.restore(self.before, self.after, now).to(now.dtype)
        copied = take(now, self.into.clamp(min=0))
        return torch.where((self.into < 0)[..., None], self.before.to(now.dtype), copied)


@dataclass
class Run:
    """What one forward needs from hook to hook (`B` images, `N` patches alive, `P` tokens before them).

    Args:
        batch, prefix, patches: sizes, `patches` before any cut.
        cuts: those that remove something, by block and place.
        grid: (rows, columns) of the patches, None if they are no grid.
        device: of the hidden states.
        proportional: whether attention counts sizes.
        restore: whether blocks hand out the full grid.
        index: `[B, N]` original numbers; None before the first cut, as the next two.
        sizes: `[B, N]` fp32, None while all stand for one patch.
        mask: `[B, N]` bool, None while no row is padded.
        done: the cuts that were made.
        memory, tower: what reducers share, and signals by their key, `[B, N, ...]`.
        attention: of the block at hand or the last one captured.
        pending: (survivors' residual stream, tokens the block believes to have) within a block cut inside.
        branch: what its MLP gave.
        short, handed: the tokens alive behind the last block, and what was handed out in their place.
    """

    batch: int
    prefix: int
    patches: int
    cuts: dict[tuple[int, str], BlockCut]
    grid: tuple[int, int] | None
    device: torch.device
    proportional: bool = False
    restore: bool = False
    index: Tensor | None = None
    sizes: Tensor | None = None
    mask: Tensor | None = None
    done: list[Done] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    tower: dict[Hashable, Tensor] = field(default_factory=dict)
    attention: Captured | None = None
    pending: tuple[Tensor, int] | None = None
    branch: Tensor | None = None
    short: Tensor | None = None
    handed: Tensor | None = None
    _bias: tuple | None = None
    _rope: tuple | None = None

    @property
    def numbers(self) -> Tensor:
        """`[B, N]` original number of every patch alive."""
        if self.index is not None:
            return self.index
        return torch.arange(self.patches, device=self.device).expand(self.batch, -1)

    def cut(self, x: Tensor, cut: BlockCut, reduction: Reduction) -> Tensor:
        """`[B, P + N, D]` -> `[B, P + K, D]`, and everything the run knows about the patches along with it."""
        prefix, before = x[:, : self.prefix], x[:, self.prefix :]
        reduction = self._trim(cut, reduction)
        after = reduction.apply(before)
        keep, valid = reduction.keep, reduction.valid if self.mask is not None else None
        with torch.no_grad():
            done = Done(cut.site, self.numbers.gather(1, keep), valid, went_to(reduction, before.shape[1]))
            if self.restore:
                done.reducer, done.before, done.after = cut.reducer, before, after
            self.done.append(done)
            self.sizes = new_sizes(reduction, self.sizes, before.shape[1])
            self.index = done.index
            self.tower = {key: take(signal, keep) for key, signal in self.tower.items()}
            if self.attention is not None:
                first = torch.arange(self.prefix, device=keep.device).expand(len(keep), -1)
                self.attention = self.attention.narrowed(torch.cat([first, keep + self.prefix], 1), valid)
        self._bias = self._rope = None
        return torch.cat([prefix, after], 1)

    def _trim(self, cut: BlockCut, reduction: Reduction) -> Reduction:
        """Without columns that no row needs; sets the mask. Asks the device only if rows may differ."""
        if self.mask is None and not cut.reducer.adaptive:
            return reduction
        keep, valid = reduction.keep, reduction.valid
        if self.mask is not None:
            valid = valid & self.mask.gather(1, keep)
        counts = valid.sum(1)
        most, fewest = torch.stack([counts.amax(), counts.amin()]).tolist()
        self.mask = None if most == fewest else valid[:, :most]
        merge = reduction.merge
        if merge is not None:  # what is not merged at all, by a weight of 0, may name a slot that is gone
            scale = None if merge.scale is None else merge.scale[:, :most]
            merge = replace(merge, slot=merge.slot.clamp(max=most - 1), scale=scale)
        sizes = None if reduction.sizes is None else reduction.sizes[:, :most]
        return Reduction(keep[:, :most], valid[:, :most], merge, sizes)

    # -------------------------------------------------------------------------------- what later blocks are handed
    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """`[B, P + N]`: what is added to the logits of every key, log(size) and -inf at padding; None for nothing."""
        if self._bias is None or self._bias[0] != dtype:
            self._bias = dtype, self._make_bias(dtype)
        return self._bias[1]

    def log_sizes(self) -> Tensor | None:
        """`[B, P + N]` fp32, 0 for prefix tokens; None unless attention is to count sizes."""
        if not self.proportional or self.sizes is None:
            return None
        sizes = self.sizes if self.mask is None else self.sizes.masked_fill(~self.mask, 1)
        return torch.nn.functional.pad(sizes.log(), (self.prefix, 0))

    def _make_bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = self.log_sizes()
        if self.mask is not None:
            bias = torch.zeros(self.valid.shape, device=self.device) if bias is None else bias
            bias = bias.masked_fill(~self.valid, -torch.inf)
        return None if bias is None else bias.to(dtype)

    @property
    def valid(self) -> Tensor:
        """`[B, P + N]` bool."""
        if self.mask is not None:
            return torch.nn.functional.pad(self.mask, (self.prefix, 0), value=True)
        return torch.ones(self.batch, self.prefix + self.numbers.shape[1], dtype=torch.bool, device=self.device)

    def rope(self, table: Tensor) -> Tensor:
        """timm's rotary table of the patches alive, `[B, 1 or H, N, 2d]`.

        Args:
            table: `[N0, 2d]`, `[H, N0, 2d]` or `[B, 1 or H, N0, 2d]`.
        """
        if self._rope is None or self._rope[0] is not table:
            rows = table if table.dim() == 4 else table[(None,) * (4 - table.dim())]
            rows = rows.expand(self.batch, -1, -1, -1).transpose(1, 2)
            self._rope = table, take(rows, self.index).transpose(1, 2)
        return self._rope[1]

    def mask_of(self, given: Tensor, heads: int, hides: bool) -> Tensor:
        """A mask of the caller's over all tokens, `[B or 1, H or 1, rows, T]` additive over those alive.

        Args:
            given: bool or additive; 2-D `[T, T]`, 3-D `[B * H, T, T]` or `[B, T, T]`, or 4-D.
            hides: whether True hides (`nn.MultiheadAttention`) instead of showing.
        """
        if not isinstance(given, Tensor):
            raise InputError(f"a mask of type {type(given).__name__} cannot be pruned; give a tensor")
        if given.dim() == 3:
            given = given.unflatten(0, (self.batch, -1))
        given = given[(None,) * (4 - given.dim())]
        if given.dtype == torch.bool:
            zeros = torch.zeros(given.shape, device=given.device)
            given = zeros.masked_fill(given if hides else ~given, -torch.inf)
        total = self.prefix + self.patches
        first = torch.arange(self.prefix, device=self.device).expand(self.batch, -1)
        columns = torch.cat([first, self.numbers + self.prefix], 1)
        if given.shape[-1] == total:
            given = take(given.movedim(-1, 1), columns).movedim(1, -1)
        if given.shape[-2] == total:
            given = take(given.movedim(-2, 1), columns).movedim(1, -2)
        return given

    def alive(self) -> Tensor:
        """`[B, P + N0]` fp32: 1 for prefix tokens and patches that are left, 0 for the others."""
        last = self.done[-1]
        left = torch.zeros(self.batch, self.prefix + self.patches + 1, device=self.device)
        left[:, : self.prefix] = 1.0
        slot = last.index + self.prefix
        if last.valid is not None:
            slot = slot.masked_fill(~last.valid, left.shape[1] - 1)
        return left.scatter_(1, slot, 1.0)[:, :-1]

    def restored(self, hidden: Tensor) -> Tensor:
        """`[B, P + N, D]` -> `[B, P + N0, D]`: all cuts undone, the last one first."""
        now = hidden[:, self.prefix :]
        for done in reversed(self.done):
            now = done.undo(now)
        return torch.cat([hidden[:, : self.prefix], now], 1)


def went_to(reduction: Reduction, count: int) -> Tensor:
    """`[B, N]` int64: the slot every token is in afterwards, -1 for those dropped.

    What is merged into several slots went to the one of largest weight (the first of those).
    """
    keep, valid, merge = reduction.keep, reduction.valid, reduction.merge
    rows, device = len(keep), keep.device
    slots = torch.arange(keep.shape[1], device=device).expand_as(keep)
    into = torch.full((rows, count + 1), -1, dtype=torch.long, device=device)  # last column: a bin
    if merge is not None and merge.source.shape[1]:
        real = merge.weight > 0
        source = torch.where(real, merge.source, count)
        best = torch.zeros(rows, count + 1, device=device).scatter_reduce(1, source, merge.weight.float(), "amax")
        wins = real & (merge.weight >= best.gather(1, source))
        first = torch.full((rows, count + 1), keep.shape[1], dtype=torch.long, device=device)
        first.scatter_reduce_(1, torch.where(wins, source, count), merge.slot, "amin")
        into = torch.where(first < keep.shape[1], first, into)
    into = into.scatter(1, torch.where(valid, keep, count), slots)
    return into[:, :count]


def new_sizes(reduction: Reduction, sizes: Tensor | None, count: int) -> Tensor | None:
    """`[B, K]` fp32: patches every kept token stands for; None while all stand for one. See `Reduction.sizes`."""
    if reduction.sizes is not None:
        return reduction.sizes.float()
    keep, merge = reduction.keep, reduction.merge
    if merge is None:
        return None if sizes is None else sizes.gather(1, keep)
    if sizes is None:
        sizes = torch.ones(len(keep), count, device=keep.device)
    weight = merge.weight.float().clamp(min=0)
    stays = torch.zeros(len(keep), count + 1, dtype=torch.bool, device=keep.device)
    stays.scatter_(1, torch.where(reduction.valid, keep, count), True)
    weight = weight.masked_fill(stays.gather(1, merge.source), 0)  # a kept token is in its own slot as a whole
    total = torch.zeros_like(sizes).scatter_add(1, merge.source, weight)
    share = weight / total.gather(1, merge.source).clamp(min=torch.finfo(torch.float32).tiny)
    return sizes.gather(1, keep).scatter_add(1, merge.slot, share * sizes.gather(1, merge.source))
