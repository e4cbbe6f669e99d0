"""The visual tokens of one forward call: where they are, which are alive, and how one stage cuts the sequence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prune.adapters.packing import PATCH, TILE
from prune.kernels.compaction import compact, take
from prune.method import Reducer, Site
from prune.report import Layout


@dataclass
class Visual:
    """All images of a batch, one row each, padded to the most tokens (`S` images, `N` tokens alive).

    Args:
        layouts: of every image.
        places: `[S, N0, 4]` coordinates of the tokens the method chooses from, before any pruning.
        tile, patch: `[S, N0]` and `[S, N0, 2]` encoder tile or frame, and place in it.
        origin: `[S, N0]` number among all placeholders of the call, modality by modality, in reading order.
        visible: `[S, N0]` bool, those the attention mask does not hide.
        sample: `[S]` batch row of every image.
        known_rows: the same on the host, where it follows from the sizes; see `rows`.
        columns: `[S, N]` the caller's column of every token alive.
        slots: `[S, N]` where it is in the current, maybe already shortened, sequence.
        token: `[S, N]` its index among the image's tokens.
        mask: `[S, N]` bool.
        initial: tokens per image before any pruning, on the host.
        counts: tokens alive per image, on the host; upper bounds once an adaptive method has cut (`exact` False).
        history: (site, token, mask) after every cut.
        tower: signals of the vision encoder, `[placeholders, ...]` in the order `origin` counts.
        memory: what reducers leave for later stages.
    """

    layouts: list[Layout]
    places: Tensor
    tile: Tensor
    patch: Tensor
    origin: Tensor
    visible: Tensor
    sample: Tensor
    columns: Tensor
    slots: Tensor
    token: Tensor
    mask: Tensor
    initial: list[int]
    counts: list[int]
    exact: bool = True
    known_rows: list[int] | None = None
    history: list[tuple[Site, Tensor, Tensor]] = field(default_factory=list)
    tower: dict[Hashable, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """`sample` on the host; asks the device once, if the sizes do not tell."""
        if self.known_rows is None:
            self.known_rows = self.sample.tolist()
        return self.known_rows

    def hide(self, valid: Tensor) -> None:
        """Tokens the caller's mask hides (`[B, L]` bool) are padding: not to be chosen, not to be counted."""
        self.visible = self.mask = self.mask & valid[self.sample[:, None], self.columns]
        self.exact = False

    def gather(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` -> `[S, N, ...]`: what the sequence holds at the tokens alive."""
        return x[self.sample[:, None], self.slots]

    def add_tower(self, signals: dict[Hashable, Tensor]) -> None:
        """Take over the signals of the vision encoder, `[placeholders, ...]` each, and where tokens come from."""
        self.tower = {key: x.to(self.mask.device) for key, x in signals.items()}
        self.tile, self.patch = (self.tower.pop(key)[self.origin] for key in (TILE, PATCH))

    def of_tower(self, key: Hashable) -> Tensor:
        """`[S, N, ...]`: a signal of the vision encoder at the tokens alive."""
        return self.tower[key][self.origin.gather(1, self.token)]


@torch.compiler.disable
def locate(groups: Sequence[tuple[Tensor, list[Layout]]], newlines: bool, tiled: bool = True) -> Visual:
    """Where every image's tokens are; no host synchronisation.

    Args:
        groups: per modality its `[B, L]` placeholder mask and its layouts, in placeholder order.
        newlines: whether separators count as visual tokens.
        tiled: whether the tiles of images' layouts are those of the encoder; else all their tokens are said to be of
            tile 0.
    """
    batch, width = groups[0][0].shape
    layouts = [layout for _, found in groups for layout in found]
    shape = _shape_of(tuple(layouts), newlines, tiled, groups[0][0].device)
    # A stable sort lists the placeholders in reading order without asking the device how many there are.
    reading = [
        (~mask).flatten().to(torch.uint8).argsort(stable=True)[: sum(len(layout.coordinates) for layout in found)]
        for mask, found in groups
    ]
    position = torch.cat(reading)[shape.origin]
    columns = position % width
    lengths = [len(layout.coordinates) for layout in layouts]
    return Visual(
        layouts=layouts,
        places=shape.places,
        tile=shape.tile,
        patch=shape.places[..., 2:],
        origin=shape.origin,
        sample=position[:, 0] // width,
        columns=columns,
        slots=columns,
        token=torch.arange(columns.shape[1], device=columns.device).expand(columns.shape),
        visible=shape.mask,
        mask=shape.mask,
        initial=list(shape.counts),
        counts=list(shape.counts),
        known_rows=rows_by_size(lengths, batch, width) if len(groups) == 1 else None,
    )


class _Shape(NamedTuple):
    """What `Visual` says of images that follows from their layouts alone."""

    places: Tensor
    tile: Tensor
    origin: Tensor
    mask: Tensor
    counts: tuple[int, ...]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _shape_of(layouts: tuple[Layout, ...], newlines: bool, tiled: bool, device: torch.device) -> _Shape:
    """Kept, because batches of the same sizes follow each other, and small copies to a device take their time."""
    lengths = torch.tensor([len(layout.coordinates) for layout in layouts])
    places = torch.cat([layout.coordinates for layout in layouts])
    wanted = torch.ones(len(places), dtype=torch.bool) if newlines else places[:, 0] >= 0
    image = torch.repeat_interleave(torch.arange(len(layouts)), lengths)[wanted]
    counts = torch.bincount(image, minlength=len(layouts))
    number = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    size = (len(layouts), int(counts.max()))
    pick = torch.zeros(size, dtype=torch.long)
    pick[image, number] = wanted.nonzero()[:, 0]
    mask = torch.arange(size[1]) < counts[:, None]
    tile = torch.where(places[:, 0] < 0, -1, places[:, 0] * tiled + places[:, 1])  # never both tiles and frames
    made = (x.to(device, non_blocking=True) for x in (places[pick], tile[pick], pick, mask))
    return _Shape(*made, tuple(counts.tolist()))


def rows_by_size(lengths: list[int], batch: int, width: int) -> list[int] | None:
    """The batch row of every image, if it follows from sizes alone.

    Where no row has room for one image more than the average, every row has the average.

    Args:
        lengths: placeholders of every image, row by row.
        batch, width: of the call.
    """
    each, rest = divmod(len(lengths), batch)
    if batch > 1 and (rest or sum(sorted(lengths)[: each + 1]) <= width):
        return None
    return [number // each for number in range(len(lengths))]


@dataclass
class Running:
    """The sequence a forward call works on, as it shrinks (`L` columns now).

    Args:
        columns: `[B, L]` the caller's column of every slot.
        ordinal: `[B, caller's L]` number of a column among the sample's valid ones: its place without padding.
        valid: `[B, L]` bool.
        counts: valid columns of every row, on the host.
        placeholder: `[B, L]` bool, visual tokens and separators.
        visual: the images, if the call has any.
        signals: captured at the layer before the site at hand, sequence in dimension 1.
        target: `[B, caller's L]` slot of every caller's column, `L` where it is gone.
        inputs: `[B, caller's L, D]` what entered the decoder, if a reducer wants it.
        transitions: by decoder layer, `[B, L, 4]` and sums `[B, 2]`; see `prune.adapters.transition`.
    """

    columns: Tensor
    ordinal: Tensor
    valid: Tensor
    counts: list[int]
    placeholder: Tensor
    visual: Visual | None = None
    signals: dict[str, object] = field(default_factory=dict)
    target: Tensor | None = None
    inputs: Tensor | None = None
    transitions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether all of `valid` is True."""
        return min(self.counts, default=0) == self.valid.shape[1]

    def cut(
        self, hidden: Tensor, site: Site, reducer: Reducer, keep: list[int], show: Callable
    ) -> tuple[Tensor, Tensor]:
        """Let a reducer choose, drop the rest, close the gaps (right-aligned, so ragged rows are left-padded).

        Args:
            show: (running sequence, hidden states) -> `prune.adapters.shown.Shown`.

        Returns:
            The shortened `[B, L', D]` hidden states and `source` `[B, L']`: the old slot of every new one.
        """
        visual = self.visual
        if self.valid.device != hidden.device:
            self._move(hidden.device)
        shown = show(self, hidden)
        with torch.no_grad():
            reduction = reducer.reduce(shown.tokens(reducer), keep)
            whole = [n * (left == n) for left, n in zip(keep, visual.counts)]
            if any(whole) and (reducer.adaptive or reduction.merge is not None):  # rows here for the others' sake
                reduction = reduction.sparing(whole, visual.mask)
            kept = reduction.valid & visual.mask.gather(1, reduction.keep)
            slots = visual.slots.gather(1, reduction.keep)
            survives = self._survivors(slots, kept)
            if visual.exact and not reducer.adaptive:
                for row, before, left in zip(visual.rows, visual.counts, keep):
                    self.counts[row] -= before - left
            else:  # only the device knows: the one host synchronisation of a cut
                self.counts = survives.sum(1).tolist()
            length = max(self.counts)
            source, valid, target = compact(survives, length)
        merged = shown.merge(reduction, site.kind == "projected")
        hidden = take(hidden, source)
        row = visual.sample[:, None]
        visual.slots = target[row, slots].clamp(max=length - 1)
        visual.columns, visual.token = (x.gather(1, reduction.keep) for x in (visual.columns, visual.token))
        visual.mask, visual.counts = kept, list(keep)
        visual.exact = visual.exact and not reducer.adaptive
        visual.history.append((site, visual.token, kept))
        if merged is not None:
            hidden = self._write(hidden, merged)
        self.columns = self.columns.gather(1, source)
        self.placeholder = self.placeholder.gather(1, source) & valid
        self.valid = valid
        gone = torch.full_like(target[:, :1], length)
        self.target = target if self.target is None else torch.cat([target, gone], 1).gather(1, self.target)
        self.signals = {}
        self.transitions = {layer: (take(x, source), sums) for layer, (x, sums) in self.transitions.items()}
        return hidden, source

    def _move(self, device: torch.device) -> None:
        """Follow the hidden states of a model that is spread over devices."""
        for state in (self, self.visual):
            for name, value in vars(state).items():
                if isinstance(value, Tensor):
                    setattr(state, name, value.to(device))
        self.signals = {name: signal.to(device) for name, signal in self.signals.items()}
        self.transitions = {layer: tuple(x.to(device) for x in pair) for layer, pair in self.transitions.items()}
        for name in ("tower", "memory"):
            setattr(self.visual, name, {key: x.to(device) for key, x in getattr(self.visual, name).items()})

    def _survivors(self, slots: Tensor, kept: Tensor) -> Tensor:
        """`[B, L]` bool: valid columns that are text or chosen."""
        visual, (batch, width) = self.visual, self.valid.shape
        flags = torch.ones(batch, width + 1, dtype=torch.bool, device=self.valid.device)  # last column: a bin
        flat = flags.view(-1)
        base = visual.sample[:, None] * (width + 1)
        flat[base + torch.where(visual.mask, visual.slots, width)] = False
        flat[base + torch.where(kept, slots, width)] = True
        return flags[:, :width] & self.valid

    def _write(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Put merged features `[S, K, D]` where their tokens are now."""
        visual, (batch, width, dim) = self.visual, hidden.shape
        flat = torch.where(visual.mask, visual.sample[:, None] * width + visual.slots, batch * width)
        padded = torch.cat([hidden.reshape(-1, dim), hidden.new_zeros(1, dim)])
        return padded.index_copy(0, flat.flatten(), features.reshape(-1, dim))[:-1].view(batch, width, dim)
