"""The hook engine for vision transformers: cuts patches between blocks, or between attention and MLP.

Hooks, in the order a forward meets them:

    patch embedding  pre   note the image's size
    block 0          pre   plan the cuts -> a `Run`
    block i          pre   cut the tokens that enter it; hand it the rotary table of those alive
    attention        pre   hand it the mask of those alive: padding, sizes, the caller's own mask
    projections      post  keep q, k and v where somebody reads them
    second norm      pre   cut behind attention, so that norm and MLP see the survivors only
    MLP branch       post  what it gave is put aside; zeros of the full length go on, for the block's own `x + ...`
    block i          post  the survivors' residual stream plus what was put aside; the full grid, if it is wanted

Weights, classes and `forward` methods stay as they are. The run lies in a thread-local place from block 0 to the last
block, because `forward_features`, `get_intermediate_layers` or `encode_image` never pass through the model's own call.
A forward that breaks off leaves its run there until the next one begins. Where nothing is to be removed no run is
opened and every hook returns None: the model computes what it would un-hooked, bit for bit.
"""

from __future__ import annotations

import math
import threading
from functools import partial

import torch
from torch import Tensor, nn

from prune.adapters.base import Attachment
from prune.adapters.heads import DERIVE
from prune.adapters.tower import patches
from prune.adapters.vit_families import VitParts
from prune.adapters.vit_heads import BlockHeads, Captured, attention_inputs, projections
from prune.adapters.vit_record import VitRecord
from prune.adapters.vit_run import BlockCut, Run
from prune.adapters.vit_signals import OF_ATTENTION, Key, layers_ran, resolve
from prune.budget import Budget
from prune.errors import ConfigError, InputError
from prune.method import Method, Stage
from prune.tokens import VisualTokens


class Place(threading.local):
    """Where the hooks of one thread meet."""

    run: Run | None = None
    record: VitRecord | None = None
    pixels: Tensor | None = None
    alive: Tensor | None = None  # see `prune.adapters.vision_sites`

    def __reduce__(self):  # a copy of the model starts with an empty place
        return Place, ()


class Blocks(Attachment):
    """One pruner on one stack of blocks. Users hold a `prune.Handle`.

    Args:
        parts: the blocks; nothing here looks at the model around them.
        method: as given by the user.
        planner: the same, placed at blocks (see `prune.adapters.vit.at_blocks`).
        budget: None if the method has budgets of its own.
        restore: whether blocks hand out the full grid from the first cut on.
        proportional: whether attention counts a token's size.
    """

    def __init__(
        self,
        parts: VitParts,
        method: Method,
        planner: Method,
        budget: Budget | None,
        restore: bool = False,
        proportional: bool = False,
    ):
        super().__init__(method, budget)
        self.parts, self.planner, self.restore, self.proportional = parts, planner, restore, proportional
        self.family = parts.family.name
        self.place = Place()
        self._plans: dict[tuple[int, Budget | None], dict[tuple[int, str], BlockCut]] = {}
        stages = planner.plan(parts.geometry(100), 10)
        self.sites = {(stage.site, stage.reducer.place) for stage in stages}
        # (block whose attention is kept) -> cuts that read it
        self.captured: dict[int, list[tuple[int, str]]] = {}
        self.derived: dict[int, list[tuple[Key, tuple[int, str]]]] = {}
        self.features: dict[int, list[tuple[Key, tuple[int, str]]]] = {}
        self.pixels_wanted = False
        self.masks = proportional or any(stage.reducer.adaptive for stage in stages)
        for stage in stages:
            self._register_readings(stage)

    def _register_readings(self, stage: Stage) -> None:
        at = stage.site.layer, stage.reducer.place
        if set(stage.reducer.signals) & OF_ATTENTION:
            self.captured.setdefault(layers_ran(stage) - 1, []).append(at)
        for spec in stage.reducer.tower.values():
            key = resolve(self.parts, spec, stage)
            kind, layer = key[:2]
            if kind == "pixels":
                self.pixels_wanted = True
            elif kind == "features":
                self.features.setdefault(layer, []).append((key, at))
            else:
                self.derived.setdefault(layer, []).append((key, at))

    # ------------------------------------------------------------------------------------------ attach
    def attach(self) -> Blocks:
        """Register the hooks, the same on every block.

        torch.compile shares the code of one block with all others and does not look at hooks again, so a module that
        has one in some block needs one in each.
        """
        hooks, parts = self._hooks, self.parts
        hooks.append(parts.patch.register_forward_pre_hook(self.before_patches))
        inside = any(place == "inside" for _, place in self.sites)
        for index, part in enumerate(parts.blocks):
            hook = self.open if index == 0 else partial(self.before_block, index)
            hooks.append(part.block.register_forward_pre_hook(hook, with_kwargs=True))
            hook = partial(self.before_attention, index)
            hooks.append(part.attention.register_forward_pre_hook(hook, with_kwargs=True))
            if self.captured or self.derived:
                for name in projections(part.attention):
                    hook = partial(self.keep_projection, index, name)
                    hooks.append(getattr(part.attention, name).register_forward_hook(hook))
            if self.derived:
                hooks.append(part.attention.register_forward_hook(partial(self.after_attention, index)))
            if inside:
                hooks.append(part.norm.register_forward_pre_hook(partial(self.before_norm, index)))
                hooks.append(part.branch.register_forward_hook(self.after_branch))
            # First in line, so that hooks that collect the outputs of blocks see ours.
            hooks.append(part.block.register_forward_hook(partial(self.after_block, index), prepend=True))
        return self

    # ------------------------------------------------------------------------------------------ opening
    @torch.compiler.disable
    def before_patches(self, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor):
            self.place.pixels = args[0].detach()

    @torch.compiler.disable
    def open(self, module: nn.Module, args: tuple, kwargs: dict):
        """Block 0, pre."""
        place, parts = self.place, self.parts
        pixels, place.pixels, place.run, place.record = place.pixels, None, None, None
        if not self.enabled:
            return None
        hidden = self._first(args[0] if args else next(iter(kwargs.values())))
        if parts.checkpointing and (parts.trunk.training or torch.is_grad_enabled() or hidden.requires_grad):
            raise InputError(
                "gradient checkpointing runs the hooks inside a block again in the backward pass; switch it off "
                "(set_grad_checkpointing(False), gradient_checkpointing_disable()) or train without the pruner"
            )
        batch, count = len(hidden), hidden.shape[1] - parts.prefix
        if count < 1:
            raise InputError(f"{hidden.shape[1]} tokens enter the first block, and {parts.prefix} of them are no patch")
        cuts, grid = self._plan(count), self._grid(pixels, count)
        record = VitRecord(self.method, self.budget, parts.geometry(count), batch, grid)
        if not cuts:
            self.record = record
            return None
        if self.masks and any(part.flash for part in parts.blocks):
            raise InputError("sizes and padding need a mask, which Flash Attention takes not; set 'sdpa' attention")
        place.record = record
        place.run = run = Run(
            batch=batch,
            prefix=parts.prefix,
            patches=count,
            cuts=cuts,
            grid=grid,
            device=hidden.device,
            proportional=self.proportional,
            restore=self.restore,
        )
        if self.pixels_wanted:
            run.tower["pixels", None] = self._pixels(pixels, count)
        return self.before_block(0, module, args, kwargs)

    def _plan(self, count: int) -> dict[tuple[int, str], BlockCut]:
        """The cuts that remove something of `count` patches."""
        key = count, self.budget
        if key not in self._plans:
            cuts, before = {}, count
            stages = self.planner.stages(self.parts.geometry(count), self.budget)
            for stage in stages:
                at = stage.site, stage.reducer.place
                if at not in self.sites:
                    raise ConfigError(
                        f"{type(self.method).__name__}.plan moved to {stage.site}; sites may depend on geometry.layers "
                        "only"
                    )
                keep = min(stage.keep, before)
                # An adaptive stage on the way to fewer has all as its bound.
                if keep != before or (stage.reducer.adaptive and stages[-1].keep < count):
                    cuts[stage.site.layer, at[1]] = BlockCut(stage.site, stage.reducer, keep)
                before = keep
            self._plans[key] = cuts
        return self._plans[key]

    def _grid(self, pixels: Tensor | None, count: int) -> tuple[int, int] | None:
        """(rows, columns) of the patches: by the image's size, else a square, else unknown."""
        convolution = self.parts.convolution
        if pixels is not None and convolution is not None:
            rows, columns = (pixels.shape[-2 + i] // convolution.stride[i] for i in range(2))
            if rows * columns == count:
                return rows, columns
        side = math.isqrt(count)
        return (side, side) if side * side == count else None

    def _pixels(self, pixels: Tensor | None, count: int) -> Tensor:
        convolution = self.parts.convolution
        found = None if pixels is None or convolution is None else patches(pixels, convolution.kernel_size)
        if found is None or found.shape[1] != count:
            raise InputError(
                f"{self.method.name} reads the pixels of every patch, and {count} patches are no plain grid of this "
                "image (patch dropout, a hybrid stem, or patches given ready-made?)"
            )
        return found

    # ------------------------------------------------------------------------------------------ block, pre
    @torch.compiler.disable
    def before_block(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        run = self.place.run
        if run is None:
            return None
        name = None if args else next(iter(kwargs))
        given = hidden = args[0] if args else kwargs[name]
        if run.short is not None:
            hidden, run.short = self._take_up(run, given), None
        cut = run.cuts.get((index, "input"))
        if cut is not None:
            hidden = self._ordered(self._cut(run, cut, self._first(hidden)))
        rope = kwargs.get("rope") if run.done else None
        if rope is not None:
            kwargs = {**kwargs, "rope": run.rope(rope)}
        if hidden is given and rope is None:
            return None
        return ((hidden, *args[1:]), kwargs) if name is None else ((), {**kwargs, name: hidden})

    def _take_up(self, run: Run, given: Tensor) -> Tensor:
        """The tokens alive, in the place of the full grid that the block before handed out."""
        handed, run.handed = run.handed, None
        same = given is handed or given.device != handed.device or given.data_ptr() == handed.data_ptr()
        if not same:
            raise InputError(
                "something changes hidden states between the blocks, and restore=True cannot tell what that means for "
                "tokens that are gone; leave restore out, or remove the hook"
            )
        return run.short.to(given.device)

    # ------------------------------------------------------------------------------------------ within a block
    @torch.compiler.disable
    def before_attention(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        run = self.place.run
        if run is None:
            return None
        entered = args[0] if args else kwargs[next(iter(kwargs))]
        if self._reads(run, index):
            run.attention = Captured(
                attention=module,
                entered=self._first(entered).detach(),
                rope=kwargs.get("rope"),
                valid=run.valid,
                bias=run.log_sizes(),
                prefix=run.prefix,
                cls=self.parts.cls,
                full=run.mask is None,
            )
        return self._masked(run, index, entered, args, kwargs) if run.done else None

    def _reads(self, run: Run, index: int) -> bool:
        """Whether the attention of this block is to be kept."""
        wanted = [at for _, at in self.derived.get(index, ())] + self.captured.get(index, [])
        return any(at in run.cuts for at in wanted)

    def _masked(self, run: Run, index: int, entered: Tensor, args: tuple, kwargs: dict):
        part = self.parts.blocks[index]
        name = part.mask_argument
        position = len(args) if name is None else part.mask_position
        positional = position < len(args)
        given = args[position] if positional else kwargs.get(name)
        bias = run.bias(entered.dtype)
        if given is None and bias is None:
            return None
        if kwargs.get("is_causal"):
            raise InputError("patches left over cannot be masked causally; leave is_causal out")
        heads = part.heads
        hides = isinstance(part.attention, nn.MultiheadAttention)
        mask = None if bias is None else bias[:, None, None]
        if given is not None:
            own = run.mask_of(given, heads, hides).to(entered.dtype)
            mask = own if mask is None else own + mask
        if hides:
            length = run.prefix + run.numbers.shape[1]
            mask = mask.expand(run.batch, heads, length, length).flatten(0, 1)
        if positional:
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: mask}

    @torch.compiler.disable
    def keep_projection(self, index: int, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        run = self.place.run
        if run is not None and self._reads(run, index):
            run.attention.raw[name] = output.detach()

    @torch.compiler.disable
    @torch.no_grad()
    def after_attention(self, index: int, module: nn.Module, args: tuple, output) -> None:
        run = self.place.run
        if run is None or not self._reads(run, index):
            return
        heads = BlockHeads(run.attention)
        for key, at in self.derived.get(index, ()):
            if at in run.cuts and key not in run.tower:
                kind, _, *options = key
                run.tower[key] = DERIVE[kind](heads, *options)[:, run.prefix :]

    @torch.compiler.disable
    def before_norm(self, index: int, module: nn.Module, args: tuple):
        run = self.place.run
        cut = None if run is None else run.cuts.get((index, "inside"))
        if cut is None:
            return None
        hidden = self._first(args[0])
        short = self._ordered(self._cut(run, cut, hidden))
        run.pending = short, hidden.shape[1]
        return (short, *args[1:])

    @torch.compiler.disable
    def after_branch(self, module: nn.Module, args: tuple, output: Tensor):
        run = self.place.run
        if run is None or run.pending is None:
            return None
        run.branch, length = output, run.pending[1]
        shape = (len(output), length) if self.parts.batch_first else (length, output.shape[1])
        return output.new_zeros(1, 1, 1).expand(*shape, output.shape[2])

    # ------------------------------------------------------------------------------------------ block, post
    @torch.compiler.disable
    def after_block(self, index: int, module: nn.Module, args: tuple, output):
        run = self.place.run
        if run is None:
            return None
        given = hidden = output[0] if isinstance(output, tuple) else output
        if run.pending is not None:
            after, (residual, _) = self.parts.blocks[index].after, run.pending
            branch, run.pending, run.branch = run.branch, None, None
            hidden = residual + (branch if after is None else after(branch))
        for key, at in self.features.get(index, ()):
            if at in run.cuts:
                run.tower[key] = self._first(hidden).detach()[:, run.prefix :]
        if not any(at in run.cuts for at in self.captured.get(index, ()) if at == (index + 1, "input")):
            run.attention = None
        last = index == len(self.parts.blocks) - 1
        if run.done and self.hands_out(index):
            run.short, run.handed = hidden, self._ordered(run.restored(self._first(hidden)))
            hidden = run.handed
        elif last and run.mask is not None:
            hidden = self._without_padding(run, hidden)
        if last:
            self.place.run = None
        if hidden is given:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def hands_out(self, index: int) -> bool:
        """Whether a block hands out the full grid once patches are gone."""
        return self.restore

    def _without_padding(self, run: Run, hidden: Tensor) -> Tensor:
        if not self.parts.cls_only:
            raise InputError(
                f"{self.method.name} left different numbers of patches in the images of this batch, and the model "
                "pools over all of them; pass restore=True, or give it one image at a time"
            )
        return self._ordered(self._first(hidden) * run.valid[..., None])

    # ------------------------------------------------------------------------------------------ the cut
    def _cut(self, run: Run, cut: BlockCut, x: Tensor) -> Tensor:
        with torch.no_grad():
            reduction = cut.reducer.reduce(self._tokens(run, cut, x.detach()), [cut.keep] * run.batch)
        x = run.cut(x, cut, reduction)
        if len(run.done) == len(run.cuts):
            record, self.place.record = self.place.record, None
            record.done = [(done.site, done.index, done.valid, done.into) for done in run.done]
            record.places = [at[1] for at in run.cuts]
            self.record = record
        return x

    def _tokens(self, run: Run, cut: BlockCut, x: Tensor) -> VisualTokens:
        numbers, reducer, block = run.numbers, cut.reducer, run.attention
        tokens = VisualTokens(
            features=x[:, run.prefix :],
            mask=run.mask,
            columns=numbers + run.prefix,
            index=numbers,
            memory=run.memory,
            sizes=run.sizes,
            prefix_features=x[:, : run.prefix],
        )
        if run.grid is not None:
            tokens.patch = torch.stack([numbers // run.grid[1], numbers % run.grid[1]], -1)
            tokens.coordinates = torch.cat([torch.zeros_like(tokens.patch), tokens.patch], -1)
        stage = Stage(cut.site, reducer, cut.keep)
        for name, spec in reducer.tower.items():
            tokens.tower[name] = run.tower[resolve(self.parts, spec, stage)]
        wanted = set(reducer.signals)
        if "block" in wanted:
            tokens.block = block
        if "keys" in wanted:
            tokens.keys = block.keys[:, run.prefix :]
        if "values" in wanted:
            tokens.values = block.values[:, run.prefix :]
        if "last_token_attention" in wanted:
            kind = "cls_attention" if self.parts.cls else "received_attention"
            tokens.last_token_attention = DERIVE[kind](BlockHeads(block))[:, run.prefix :]
        if "attention" in wanted:
            tokens.attention = attention_inputs(block)
        if "normed_features" in wanted:
            tokens.normed_features = self.parts.final(tokens.features)
        return tokens

    # ------------------------------------------------------------------------------------------ layout
    def _first(self, x: Tensor) -> Tensor:
        """Batch first."""
        return x if self.parts.batch_first else x.transpose(0, 1)

    _ordered = _first  # and back: the same exchange
