"""Cuts inside the vision encoders of Qwen-VL, which run all images of a call as one sequence of patches.

One visual token of the language model is a merge group: `g` consecutive patches, also where windows permute them
(Qwen2.5-VL permutes whole groups). So whole groups are kept or dropped, and a reducer sees one row per image or video,
its groups in the order of the language model's tokens. Hooks, in the order a forward meets them:

    encoder  pre   note grids, windows and pixels; plan the cuts -> a `PackedRun`
    block i  pre   take up the patches alive, cut; hand it the segments and rotary tables of those alive
    block i  post  the full sequence again: mergers and the end of the windows count patches
    encoder  post  let go of the run

Attention is full within segments (frames, or windows), whose bounds say all there is to say: no masks. A segment that
lost all its patches is no longer there. Where nothing is to be removed every hook returns None.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune.adapters.base import Attachment
from prune.adapters.structure import Parts
from prune.adapters.tower import window_order
from prune.adapters.vit import at_blocks
from prune.adapters.vit_run import new_sizes, went_to
from prune.errors import ConfigError, InputError, PruneError, UnsupportedMethodError
from prune.method import Method, Reducer, Stage
from prune.registry import get_method, list_methods
from prune.tokens import Reduction, VisualTokens


@dataclass
class PackedCut:
    """One stage: `keep[b]` groups of the b-th of the images that are cut are left."""

    reducer: Reducer
    keep: list[int]


@dataclass
class PackedRecord:
    """What the last run that cut anything did; read only when somebody asks.

    Args:
        group: patches in a group.
        sizes: groups of every image or video.
        rows: the images that were cut.
        before: groups each of `rows` has by now.
        stages: block -> (reducer, groups of each of `rows` before the cut, and behind it).
        blocks: for every block the groups alive (`PackedRun.place`) and the bounds of segments in the uncut sequence.
    """

    group: int
    sizes: list[int]
    rows: list[int]
    before: list[int]
    stages: dict[int, tuple[Reducer, list[int], list[int]]] = field(default_factory=dict)
    blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def note_cut(self, index: int, reducer: Reducer, counts: list[int]) -> None:
        self.stages[index] = reducer, self.before, counts
        self.before = counts

    def gone(self) -> list[list[tuple[int, int]]]:
        """Per block and image: patches that are gone, and pairs of patches no longer attended to. Synchronises."""
        ends = self.group * torch.tensor(self.sizes).cumsum(0)
        found = []
        for place, bounds in self.blocks:
            bounds, left = bounds.cpu().long(), torch.zeros(sum(self.sizes), dtype=torch.long)
            left = left.index_fill(0, place.cpu(), 1).repeat_interleave(self.group)
            number = F.pad(left.cumsum(0), (1, 0))[bounds].diff()  # patches alive in every segment
            image = torch.bucketize(bounds[:-1], ends, right=True)
            gone = torch.stack([bounds.diff() - number, bounds.diff() ** 2 - number**2], 1)
            found.append(torch.zeros(len(ends), 2, dtype=torch.long).index_add(0, image, gone).tolist())
        return found


@dataclass
class PackedRun:
    """One forward of the encoder: `B` images that are cut, `N` groups alive in the longest, `G` alive in the sequence.

    Images whose budget removes nothing are no rows here, as if they came alone; their patches run along.

    Args:
        record: what to tell of the run.
        group: patches in a group.
        total: groups of all images.
        cuts: by block.
        grid: `[2, B, 1]`, rows and columns of groups.
        number: `[B, N]` group among all of the call, in the order of the language model.
        index: `[B, N]` group among those of its image.
        at: `[B, N]` its slot in the running sequence, any at padding.
        mask: `[B, N]` bool.
        counts: groups alive per row.
        place: `[G]` where the groups alive were in the uncut sequence, ascending.
        pixels: `[total, g * P]` in the order of `number`, None if nobody reads them.
        source: `[total]` slot of every group of the uncut sequence, or of what it was merged into, or -1; None: uncut.
        base: `[total, g, D]` what was handed out at the last cut, for groups that are gone.
        sizes: `[B, N]` fp32 groups a token stands for; None: all one.
        memory: what reducers share.
        short, handed: the patches alive behind the last block, and what was handed out in their place.
    """

    record: PackedRecord
    group: int
    total: int
    cuts: dict[int, PackedCut]
    grid: Tensor
    number: Tensor
    index: Tensor
    at: Tensor
    mask: Tensor
    counts: list[int]
    place: Tensor
    pixels: Tensor | None = None
    source: Tensor | None = None
    base: Tensor | None = None
    sizes: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    short: Tensor | None = None
    handed: Tensor | None = None
    _narrowed: dict[int, tuple] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ the cut
    def cut(self, cut: PackedCut, x: Tensor) -> Tensor:
        """`[G * g, D]` -> `[G' * g, D]`. Synchronises if only the device knows how many are left."""
        groups = x.unflatten(0, (-1, self.group))
        self._move(x.device)
        with torch.no_grad():
            keep = [min(pair) for pair in zip(cut.keep, self.counts)]
            reduction = cut.reducer.reduce(self.tokens(cut.reducer, groups.detach()), keep)
            full = reduction.valid & self.mask.gather(1, reduction.keep)
            before, self.counts = self.counts, full.sum(1).tolist() if cut.reducer.adaptive else keep
            most, alive = max(self.counts), len(groups) - sum(before) + sum(self.counts)
            kept, valid = reduction.keep[:, :most], full[:, :most]
            stays = torch.ones(len(groups) + 1, dtype=torch.bool, device=x.device)  # the last one is a bin
            stays[self.at.masked_fill(~self.mask, len(groups))] = False
            stays[self.at.gather(1, kept).masked_fill(~valid, len(groups))] = True
            stays = stays[:-1]
            chosen = (~stays).to(torch.uint8).argsort(stable=True)[:alive]
            slot = torch.where(stays, stays.cumsum(0) - 1, -1)
            at = slot[self.at.gather(1, kept)].masked_fill(~valid, 0)
            if reduction.merge is not None:
                reduction = Reduction(reduction.keep, full, reduction.merge, reduction.sizes)
                into = went_to(reduction, self.at.shape[1])
                joined = self.at.masked_fill(~self.mask | (into < 0), len(groups))
                slot = F.pad(slot, (0, 1))
                slot = slot.scatter(0, joined.flatten(), at.gather(1, into.clamp(min=0)).flatten())[:-1]
        short = groups[chosen]
        if reduction.merge is not None:
            merged = reduction.apply(groups.flatten(1)[self.at])[:, :most].flatten(0, 1)
            padded = torch.cat([short, torch.zeros_like(short[:1])])  # padding goes to the last one
            where = at.masked_fill(~valid, alive).flatten()
            short = padded.index_copy(0, where, merged.unflatten(1, groups.shape[1:]))[:-1]
        with torch.no_grad():
            sizes = new_sizes(reduction, self.sizes, self.at.shape[1])
            self.sizes = None if sizes is None else sizes[:, :most]
        self.base = groups if self.source is None else self._whole(groups)
        self.source = slot if self.source is None else torch.where(self.source < 0, -1, slot[self.source])
        self.place, self.at, self.mask = self.place[chosen], at, valid
        self.number, self.index = self.number.gather(1, kept), self.index.gather(1, kept)
        self._narrowed.clear()
        return short.flatten(0, 1)

    def _move(self, device: torch.device) -> None:
        """Blocks may be spread over devices."""
        if self.place.device != device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
            self.memory = {name: value.to(device) for name, value in self.memory.items()}

    def tokens(self, reducer: Reducer, groups: Tensor) -> VisualTokens:
        """What a reducer is shown of `[G, g, D]`."""
        rows, columns = self.grid
        frame, rest = self.index // (rows * columns), self.index % (rows * columns)
        patch = torch.stack([rest // columns, rest % columns], -1)
        return VisualTokens(
            features=groups.flatten(1)[self.at],
            mask=self.mask,
            coordinates=torch.cat([torch.stack([0 * frame, frame], -1), patch], -1),
            columns=self.index,
            index=self.index,
            tile=frame,
            patch=patch,
            tower={name: self.pixels[self.number] for name in reducer.tower},
            memory=self.memory,
            sizes=self.sizes,
        )

    # ------------------------------------------------------------------------------------------ behind a cut
    def narrowed(self, kwargs: dict) -> dict:
        """A block's keyword arguments for the patches alive."""
        out = dict(kwargs)
        for name in ("position_embeddings", "rotary_pos_emb"):
            if (table := kwargs.get(name)) is not None:
                out[name] = tuple(map(self._rows, table)) if isinstance(table, tuple | list) else self._rows(table)
        if (bounds := kwargs.get("cu_seqlens")) is not None:
            out["cu_seqlens"] = self._once(bounds, self._bounds)
            if isinstance(most := kwargs.get("max_seqlen"), int | Tensor):
                found = out["cu_seqlens"].diff().amax()
                out["max_seqlen"] = int(found) if isinstance(most, int) else found.to(most)
        return out

    def _rows(self, table: Tensor) -> Tensor:
        return self._once(table, lambda table: table[self._patches(self.place).to(table.device)])

    def _bounds(self, bounds: Tensor) -> Tensor:
        """Where segments end, counted in patches alive; empty segments are gone."""
        before = F.pad(self.alive().cumsum(0, dtype=bounds.dtype), (1, 0)).to(bounds.device)
        return before[bounds.long()].unique_consecutive()

    def _once(self, given: Tensor, make) -> Tensor:
        """All blocks are given the same tables; entries hold them, so that an id stays theirs."""
        if id(given) not in self._narrowed:
            self._narrowed[id(given)] = given, make(given)
        return self._narrowed[id(given)][1]

    def _patches(self, groups: Tensor) -> Tensor:
        """`[n]` -> `[n * g]`."""
        return (groups[:, None] * self.group + torch.arange(self.group, device=groups.device)).flatten()

    def alive(self) -> Tensor:
        """`[total * g]` fp32 in the order of the uncut sequence: 1 for patches that are left, else 0."""
        left = torch.zeros(self.total, device=self.place.device).index_fill(0, self.place, 1.0)
        return left.repeat_interleave(self.group)

    def restored(self, x: Tensor) -> Tensor:
        """`[G * g, D]` -> `[total * g, D]`: merged groups copy what they are in, dropped ones are what they were."""
        return self._whole(x.unflatten(0, (-1, self.group))).flatten(0, 1)

    def _whole(self, groups: Tensor) -> Tensor:
        source, base = self.source.to(groups.device), self.base.to(groups)
        return torch.where((source < 0)[:, None, None], base, groups[source.clamp(min=0)])


class Place(threading.local):
    """Where the hooks of one thread meet."""

    run: PackedRun | None = None
    alive: Tensor | None = None

    def __reduce__(self):  # a copy of the model starts with an empty place
        return Place, ()


class PackedBlocks(Attachment):
    """The cuts inside a packed vision encoder.

    Args:
        owner: the engine of the whole model, whose budget and switch hold.
        parts: of that model.
        planner: has its stages at the blocks of the encoder, `prune.adapters.vision_sites.InTower`.
    """

    def __init__(self, owner, parts: Parts, planner: Method):
        super().__init__(owner.method, owner.budget)
        self.owner, self.parts, self.planner, self.place = owner, parts, planner, Place()
        self.family = parts.family.name
        stages = planner.plan(parts.geometry(100), 10)
        self.sites = {stage.site for stage in stages}
        self.pixels_wanted = any(stage.reducer.tower for stage in stages)

    def attach(self) -> PackedBlocks:
        """Register the hooks, the same on every block."""
        tower, hooks = self.parts.tower, self._hooks
        hooks.append(tower.register_forward_pre_hook(self.open, with_kwargs=True))
        hooks.append(tower.register_forward_hook(self.close, always_call=True))
        for index, block in enumerate(self.parts.tower_blocks):
            hooks.append(block.register_forward_pre_hook(partial(self.before_block, index), with_kwargs=True))
            # First in line, so that hooks that collect the outputs of blocks see ours.
            hooks.append(block.register_forward_hook(partial(self.after_block, index), prepend=True))
        return self

    def take_alive(self) -> Tensor:
        """`[S]` fp32 of the last run in this thread, in the order of the blocks: 1 for patches left, 0 for others."""
        found, self.place.alive = self.place.alive, None
        return found

    # ------------------------------------------------------------------------------------------ the encoder
    @torch.compiler.disable
    def open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.enabled, self.budget = self.owner.enabled, self.owner.budget
        self.place.run = self.place.alive = self.record = None
        if not self.enabled:
            return
        pixels = args[0] if args else kwargs.get("hidden_states", kwargs.get("pixel_values"))
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self.place.alive = torch.ones(len(pixels), device=pixels.device)
        edge = self.parts.core.config.vision_config.spatial_merge_size
        grid = grid.cpu()  # the encoder reads it several times itself
        shapes = [(t, h // edge, w // edge) for t, h, w in grid.tolist()]
        rows, cuts = self._plan([t * h * w for t, h, w in shapes])
        if not cuts:
            return
        block = self.parts.tower_blocks[0]
        if block.training and getattr(block, "gradient_checkpointing", False):
            if type(block).__call__ is not nn.Module.__call__:
                raise InputError(
                    "gradient checkpointing in this version of transformers runs hooks of blocks twice; upgrade "
                    "transformers, switch checkpointing off, or use a method that acts at projected"
                )
        order = window_order(module, grid, kwargs)
        self.place.run = opened(shapes, rows, cuts, edge**2, order, pixels.device)
        self.record = self.place.run.record
        if self.pixels_wanted:
            self.place.run.pixels = pixels.detach().unflatten(0, (-1, edge**2)).flatten(1)

    def _plan(self, counts: list[int]) -> tuple[list[int], dict[int, PackedCut]]:
        """The images of which something is to be removed, and the cuts, for images of so many groups."""
        by_count = {n: self.planner.stages(self.parts.geometry(n), self.budget) for n in set(counts)}
        rows = [image for image, n in enumerate(counts) if by_count[n][-1].keep < n]
        cuts, before = {}, [counts[image] for image in rows]
        for number, stage in enumerate(by_count[counts[rows[0]]] if rows else ()):
            if stage.site not in self.sites:
                raise ConfigError(
                    f"{type(self.method).__name__}.plan moved to {stage.site}; sites may depend on geometry.layers only"
                )
            keep = [min(by_count[counts[image]][number].keep, n) for image, n in zip(rows, before)]
            if keep != before or stage.reducer.adaptive:  # an adaptive stage on the way to fewer has all as its bound
                cuts[stage.site.layer] = PackedCut(stage.reducer, keep)
            before = keep
        return rows, cuts

    @torch.compiler.disable
    def close(self, module: nn.Module, args: tuple, output) -> None:
        """Always called, also after an exception (then `output` is None)."""
        self.place.run = None
        if output is None:
            self.place.alive = None

    # ------------------------------------------------------------------------------------------ a block
    @torch.compiler.disable
    def before_block(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        run = self.place.run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if run.short is not None:
            hidden = self._take_up(run, hidden)
        if (cut := run.cuts.get(index)) is not None:
            hidden = run.cut(cut, hidden)
            run.record.note_cut(index, cut.reducer, run.counts)
        run.record.blocks.append((run.place, kwargs["cu_seqlens"]))
        if run.source is None:
            return None
        kwargs = {name: value for name, value in run.narrowed(kwargs).items() if name != "hidden_states"}
        return (hidden, *args[1:]), kwargs

    def _take_up(self, run: PackedRun, given: Tensor) -> Tensor:
        """The patches alive, in the place of the full sequence that the block before handed out."""
        short, handed, run.short, run.handed = run.short, run.handed, None, None
        if given is not handed and given.device == handed.device and given.data_ptr() != handed.data_ptr():
            raise InputError(
                f"something changes hidden states between the blocks, and {self.method.name} cannot tell what that "
                "means for patches that are gone; remove the hook"
            )
        return short.to(given.device)

    @torch.compiler.disable
    def after_block(self, index: int, module: nn.Module, args: tuple, output: Tensor):
        run = self.place.run
        if run is None or run.source is None:
            return None
        run.short, run.handed = output, run.restored(output)
        if index == len(self.parts.tower_blocks) - 1:
            self.place.alive, self.place.run = run.alive(), None
        return run.handed


def opened(
    shapes: Sequence[tuple[int, int, int]],
    rows: list[int],
    cuts: dict[int, PackedCut],
    group: int,
    order: Tensor | None,
    device: torch.device,
) -> PackedRun:
    """A run before its first cut.

    Args:
        shapes: (frames, rows, columns) of every image or video, in groups.
        rows: the images that are cut.
        order: `[total]` slot of every group in the encoder's sequence; None: its own number.
    """
    sizes = [t * h * w for t, h, w in shapes]
    starts = [0, *accumulate(sizes)]
    counts = [sizes[image] for image in rows]
    table = [[starts[i] for i in rows], counts, [shapes[i][1] for i in rows], [shapes[i][2] for i in rows]]
    first, length, down, across = torch.tensor(table).to(device, non_blocking=True)[..., None]
    index = torch.arange(max(counts), device=device).expand(len(rows), -1)
    mask = index < length
    index = index.masked_fill(~mask, 0)
    number = first + index
    return PackedRun(
        record=PackedRecord(group, sizes, rows, counts),
        group=group,
        total=starts[-1],
        cuts=cuts,
        grid=torch.stack([down, across]),
        number=number,
        index=index,
        at=number if order is None else order.to(device, non_blocking=True)[number],
        mask=mask,
        counts=counts,
        place=torch.arange(starts[-1], device=device),
    )


# -------------------------------------------------------------------------------------------------- what is served
def check_packed(parts: Parts, stages: Sequence[Stage], proportional: bool | None) -> None:
    """Refuse what these encoders cannot do.

    Raises:
        ConfigError: blocks out of range or out of order.
        UnsupportedMethodError: names the methods that work.
    """
    blocks, count, name = [stage.site.layer for stage in stages], len(parts.tower_blocks), stages[0].reducer.name
    if max(blocks) >= count:
        raise ConfigError(f"{name} acts at block:{max(blocks)}, and this vision encoder has blocks 0 to {count - 1}")
    if any(second <= first for first, second in zip(blocks, blocks[1:])):
        sites = ", ".join(str(stage.site) for stage in stages)
        raise ConfigError(f"stages inside the vision encoder must ascend, got {sites}")
    for stage in stages:
        if (reason := _obstacle(stage.reducer, proportional)) is not None:
            works = ", ".join(works_inside(parts)) or "none"
            raise UnsupportedMethodError(
                f"inside the vision encoder of {parts.family.name}, {stage.reducer.name} {reason}; methods that work "
                f"there: {works}; others act at projected or in the decoder"
            )


def _obstacle(reducer: Reducer, proportional: bool | None) -> str | None:
    """Why a reducer cannot be served, if so."""
    if reducer.place != "input":
        return f"acts {reducer.place} blocks, and blocks can be cut at their input only"
    if reducer.signals:
        return f"reads {', '.join(reducer.signals)}, which cannot be had there"
    kinds = sorted({spec.kind for spec in reducer.tower.values()} - {"pixels"})
    if kinds:
        return f"reads {', '.join(kinds)}, which cannot be had there"
    if reducer.needs_projector:
        return "reads the projector, which cannot be had there"
    if reducer.reconstructs:
        return "puts features back by a reconstruction of its own, which is not served"
    if reducer.proportional if proportional is None else proportional:
        return "wants attention to count sizes (pass proportional=False), and attention takes no mask"
    return None


def works_inside(parts: Parts) -> list[str]:
    """Names of the methods that `apply_pruner` takes at blocks of this encoder with default options."""
    return [name for name in list_methods() if _fits(parts, get_method(name))]


def _fits(parts: Parts, method: Method) -> bool:
    try:
        placed = at_blocks(method, len(parts.tower_blocks), None)
        stages = placed.plan(parts.geometry(100), 10)
    except PruneError:
        return False
    return all(_obstacle(stage.reducer, None) is None for stage in stages)
