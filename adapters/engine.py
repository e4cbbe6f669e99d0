"""The hook engine: cuts visual tokens out of an unmodified Hugging Face vision-language model.

Hooks, in the order a forward meets them:

    core     pre   find the images and plan the cuts -> a `Call`, which travels on inside the call's kwargs
    decoder  pre   cuts before layer 0; rewrites embeddings, mask, positions; takes over deepstack features
    layer i  pre   cuts at layer i; hands the layer the mask and rotary tables of its own, shorter sequence
    decoder  post  gives the hidden states the caller's length again; writes the ledger to the cache

Methods that read the vision encoder or the work of single modules add hooks there (`tower`, `transition`).

What one call needs lives in its `Call`, what a conversation needs in the `Ledger` on its cache: no globals, so threads
do not meet and an exception leaves nothing behind. Every hook returns None - touches nothing - in a call that has no
images and no pruned cache.
"""

from __future__ import annotations

import inspect
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from prune.adapters import cache as caches
from prune.adapters import layouts
from prune.adapters.base import Attachment
from prune.adapters.call import CALL, Call, Slots
from prune.adapters.images import SHAPES, Found, find_images, keep_shapes, tower_signals
from prune.adapters.masks import gather_custom, take_apart
from prune.adapters.planner import Cut, Question, plan
from prune.adapters.positions import last_valid, renumber, shift
from prune.adapters.record import Record, bytes_per_value
from prune.adapters.shown import Shown
from prune.adapters.signals import LayerInput, capture
from prune.adapters.structure import Parts
from prune.adapters.tower import tower_of
from prune.adapters.transition import Transition
from prune.adapters.vision_sites import BehindTower, cuts_of, tiled
from prune.adapters.visual import Running, locate
from prune.budget import Budget
from prune.errors import InputError, UnsupportedModelError
from prune.kernels.compaction import forward_fill, take
from prune.method import Method, Site


class Engine(Attachment):
    """One pruner on one model. Users hold a `prune.Handle`."""

    takes_visual_mask = True

    def __init__(
        self,
        parts: Parts,
        method: Method,
        budget: Budget | None,
        positions: str,
        inner: Method | None = None,
        proportional: bool = False,
    ):
        """`inner` is the method with its stages at blocks of the vision encoder, if it has any."""
        super().__init__(method, budget)
        self.parts, self.positions, self.family = parts, positions, parts.family.name
        self.planner, self.vision = method, None
        if inner is not None:
            self.planner = BehindTower(inner, tiled(parts))
            self.vision = cuts_of(self, inner, proportional)
        stages = self.planner.plan(parts.geometry(100), 10)
        sites = [stage.site for stage in stages]
        self.bounds = tuple(dict.fromkeys(depth(site) for site in sites if depth(site) > 0))
        # layer -> signals to take at its input for the cut at the next one
        self.captures = {
            depth(stage.site) - 1: stage.reducer.signals
            for stage in stages
            if stage.reducer.signals and depth(stage.site) > 0
        }
        self.tower = tower_of(parts, stages, self)
        if self.vision is not None:
            self.tower.vision = self.vision
        layers = {n for s in stages if "transition" in s.reducer.signals for n in s.reducer.transition_layers}
        self.transition = Transition(parts.layers, layers)
        self.inputs_wanted = any("inputs" in stage.reducer.signals for stage in stages)
        self.signature = f"{method!r} with {positions} positions"
        self.visual_mask: Tensor | None = None

    # ------------------------------------------------------------------------------------------ attach
    def attach(self) -> Engine:
        parts, hooks = self.parts, self._hooks
        hooks.append(parts.core.register_forward_pre_hook(self.before_core, with_kwargs=True))
        if set(SHAPES) & set(inspect.signature(parts.tower.forward).parameters):
            hooks.append(parts.tower.register_forward_pre_hook(drop_call, with_kwargs=True))
            hooks.append(parts.tower.register_forward_hook(keep_shapes, with_kwargs=True))
        if self.vision is not None:
            self.vision.attach()
        if self.tower is not None:
            hooks += self.tower.attach()
        hooks.append(parts.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
        for index, layer in enumerate(parts.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self.before_layer, index), with_kwargs=True))
        hooks += self.transition.attach()
        hooks.append(parts.decoder.register_forward_hook(self.after_decoder, with_kwargs=True))
        return self

    def detach(self) -> None:
        super().detach()
        if self.vision is not None:
            self.vision.detach()

    # ------------------------------------------------------------------------------------------ core, pre
    def before_core(self, module: nn.Module, args: tuple, kwargs: dict):
        kwargs = by_name(module, args, kwargs)
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None  # the model has an error message for this
        cache = kwargs.get("past_key_values")
        caches.check(cache, self.signature, len(inputs))
        call = Call(ledger=caches.ledger_of(cache))
        found = find_images(self.parts, kwargs, self.visual_mask) if self.enabled else None
        if found is not None:
            kwargs = found.kwargs
            self._read_mask(call, kwargs.get("attention_mask"), cache, inputs)
            self._plan(call, found)
        if call.ledger is None and not call.cuts:
            if call.question is not None:
                call.question.check()
            self.record = call.record or self.record
            return None if found is None else ((), kwargs)
        return (), {**kwargs, CALL: call}

    def _read_mask(self, call: Call, mask, cache, inputs: Tensor) -> None:
        """Which of the caller's columns are padding; `inputs` are ids `[B, L]` or embeddings `[B, L, D]`."""
        batch, call.width = inputs.shape[:2]
        slots = caches.slots_of(cache, 0)
        call.past = slots if call.ledger is None else slots + call.ledger.offset[0]
        call.caller = take_apart(mask, batch, call.width, call.past, inputs.device, _static(cache))

    def _plan(self, call: Call, found: Found) -> None:
        call.placeholder, valid = found.placeholder, call.caller.new
        if self.method.needs_question:
            question = Question(self.method, call.placeholder, valid)
            if question.event is None:
                question.check()
            else:
                call.question = question
        tiled = self.parts.family.image is not layouts.anyres
        call.visual = locate(found.groups, self.method.newlines, tiled)
        if not call.caller.new_full and bool((call.placeholder & ~valid).any()):
            call.visual.hide(valid)
        for cut in plan(self.parts, self.planner, self.budget, call.visual, valid, call.caller.counts):
            call.cuts.setdefault(depth(cut.site), []).append(cut)
        if call.cuts and self.tower is not None:
            if self.parts.encodes_first:
                call.visual.add_tower(tower_signals(self.parts, found, self.tower.keys))
            else:
                call.found = found
        size = bytes_per_value(self.parts.decoder.dtype)
        call.record = Record(self.method, self.budget, call.visual, valid, self.parts.geometry(0), size)

    # ------------------------------------------------------------------------------------------ decoder, pre
    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict):
        call: Call | None = kwargs.get(CALL)
        if call is None:
            return None
        kwargs = by_name(module, args, kwargs)
        del kwargs[CALL]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        length = kwargs["inputs_embeds"].shape[1]
        own_mask = isinstance(mask, Tensor) and mask.dim() == 4 and not _static(cache)
        if call.visual is None and not own_mask and (mask is None or length == 1 or _static(cache)):
            return (), self._step(call, kwargs, length)
        self._open(call, kwargs)
        self._cut_before_decoder(call, kwargs)
        return (), {**kwargs, CALL: call}

    def _step(self, call: Call, kwargs: dict, length: int) -> dict:
        """Text on a pruned cache: nothing to cut, no host synchronisation, no ledger update."""
        call.step = call.changed = True
        ledger, cache = call.ledger, kwargs["past_key_values"]
        positions = kwargs.get("position_ids")
        if positions is None:
            device = kwargs["inputs_embeds"].device
            positions = (torch.arange(length, device=device) + cache.get_seq_length())[None]
        kwargs["position_ids"] = shift(positions, ledger.delta)
        call.step_mask = kwargs.get("attention_mask")
        kwargs["attention_mask"] = self._step_mask(call, cache, 0, length)
        # With one query and one layer group the decoder's own mask and positions are right for every layer.
        return {**kwargs, CALL: call} if self.bounds or length > 1 else kwargs

    def _step_mask(self, call: Call, cache, layer: int, length: int) -> Tensor | None:
        """Validity of exactly as many columns as the layer's keys have: SDPA reads a mask from the left, Flash
        Attention from the right."""
        ledger = call.ledger
        group = ledger.group(layer)
        given = call.step_mask if isinstance(call.step_mask, Tensor) and call.step_mask.dim() == 2 else None
        if ledger.valid[group] is None and given is None:
            return None
        slots = cache.layers[layer].max_cache_len if _static(cache) else caches.slots_of(cache, layer) + length
        valid = ledger.validity(group, slots)
        if given is None or given.shape[1] < slots + ledger.offset[group]:
            return valid
        told = given.bool().gather(1, ledger.logical(group, slots).to(given.device))
        return told if valid is None else told & valid.to(told.device)

    def _open(self, call: Call, kwargs: dict) -> None:
        """Set up the running sequence and what is known of the cached columns."""
        if call.question is not None:  # before anything is written to the cache
            call.question.check()
        embeds, cache, ledger = kwargs["inputs_embeds"], kwargs.get("past_key_values"), call.ledger
        batch, device, groups = len(embeds), embeds.device, len(self.bounds) + 1
        if call.caller is None:
            self._read_mask(call, kwargs.get("attention_mask"), cache, embeds)
        if ledger is None:
            columns = torch.arange(call.past, device=device).expand(batch, -1)
            call.cached = [Slots(columns, call.caller.past, call.caller.past_full)] * groups
        else:
            call.changed, call.delta = True, ledger.delta
            for group, offset in enumerate(ledger.offset):
                slots = call.past - offset
                valid = ledger.validity(group, slots)
                full = valid is None
                valid = torch.ones(batch, slots, dtype=torch.bool) if full else valid
                call.cached.append(Slots(ledger.logical(group, slots).to(device), valid.to(device), full))
        placeholder = call.placeholder
        if placeholder is None:
            placeholder = torch.zeros(batch, call.width, dtype=torch.bool, device=device)
        columns = torch.arange(call.width, device=device).expand(batch, -1)
        new = call.caller.new
        ordinal = new.cumsum(1) - 1
        call.run = Running(columns, ordinal, new, list(call.caller.counts), placeholder.to(device), call.visual)
        if self.inputs_wanted:
            call.run.inputs = kwargs["inputs_embeds"].detach()
        deepstack = kwargs.get("deepstack_visual_embeds")
        deepstack = [] if deepstack is None else deepstack
        if self.parts.replays_hooks and (len(deepstack) or any(call.cuts.get(bound) for bound in self.bounds)):
            raise InputError(
                "gradient checkpointing in this version of transformers runs hooks of decoder layers twice; upgrade "
                "transformers, switch checkpointing off, or use a method that acts at projected"
            )
        if len(deepstack):
            self._take_over_deepstack(call, kwargs)
        caches.mark_interrupted(cache)

    def _validity(self, call: Call, group: int) -> tuple[Tensor, bool]:
        """`[B, kv]` bool of cached and new slots of a layer group, and whether all are known to be valid."""
        cached, run = call.cached[group], call.run
        past, full = cached.valid, cached.full and run.full
        if call.ledger is not None and call.caller.tells_past:  # the mask may hide what the cache would show
            past, full = past & call.caller.past.gather(1, cached.columns), False
        return torch.cat([past.to(run.valid.device), run.valid], 1), full

    def _take_over_deepstack(self, call: Call, kwargs: dict) -> None:
        """The decoder adds these after its first layers, to columns it believes to know; do it for the decoder."""
        features, mask = kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"]
        if len(features) >= len(self.parts.layers):
            raise UnsupportedModelError("deepstack features for every decoder layer cannot be pruned")
        embeds = kwargs["inputs_embeds"]
        where = mask.to(embeds.device)[..., None].expand_as(embeds)
        call.deepstack = [torch.zeros_like(embeds).masked_scatter(where, f.to(embeds)) for f in features]
        kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None

    def _cut_before_decoder(self, call: Call, kwargs: dict) -> None:
        run, cache, embeds = call.run, kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        if call.found is not None:
            call.found.encoded = self.tower.collected(call.found.requests)
            call.visual.add_tower(tower_signals(self.parts, call.found, self.tower.keys, embeds))
        for cut in call.cuts.get(0, ()):
            embeds = self._cut(call, cut, embeds)
        call.ends.append(Slots(run.columns, run.valid, run.full))
        if not call.changed:
            return
        positions = kwargs.get("position_ids")
        if positions is None:  # what the decoder would have made
            positions = (torch.arange(call.width, device=embeds.device) + call.past)[None]
        axes = shift(positions if positions.dim() == 3 else positions[None], call.delta)
        axes = axes.to(embeds.device).expand(-1, len(embeds), -1)
        if run.target is not None:
            last = take(axes, last_valid(call.caller.new), dim=2)[..., 0]
            axes = take(axes, run.columns, dim=2)
            if self.positions == "compact":
                axes = renumber(axes, run.valid)
                moved = axes[..., -1] - last  # later tokens count on from the row's last position
                call.delta = moved if call.delta is None else call.delta + moved
        valid, full = self._validity(call, 0)
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = axes if positions.dim() == 3 else axes[0]
        if call.caller.custom is not None:
            kwargs["attention_mask"] = self._custom_mask(call, 0, valid)
        else:
            # Without a cache a mask must be there: gaps in the position ids would be read as packed sequences.
            spare = full and not _static(cache) and self._will_cache(cache, kwargs)
            kwargs["attention_mask"] = None if spare else valid.long()

    def _will_cache(self, cache, kwargs: dict) -> bool:
        """Whether the decoder has a cache, or makes one before it makes its mask."""
        decoder, wanted = self.parts.decoder, kwargs.get("use_cache")
        wanted = getattr(decoder.config, "use_cache", False) if wanted is None else wanted
        checkpoints = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        return cache is not None or (bool(wanted) and not checkpoints)

    def _cut(self, call: Call, cut: Cut, hidden: Tensor) -> Tensor:
        hidden, source = call.run.cut(hidden, cut.site, cut.reducer, cut.keep, partial(Shown, self.parts))
        call.deepstack = [take(features, source) for features in call.deepstack]
        if call.rope is not None:
            call.rope = tuple(take(table, source, dim=table.dim() - 2) for table in call.rope)
        call.changed = True
        return hidden

    def _custom_mask(self, call: Call, group: int, valid: Tensor) -> Tensor:
        columns = torch.cat([call.cached[group].columns, call.run.columns + call.past], 1)
        return gather_custom(call.caller.custom, call.run.columns, columns, valid)

    # ------------------------------------------------------------------------------------------ layer, pre
    def before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        call: Call | None = kwargs.get(CALL)
        if call is None:
            return None
        kwargs = by_name(module, args, kwargs)
        del kwargs[CALL]
        if not call.step and 0 < index <= len(call.deepstack):
            hidden = kwargs["hidden_states"]
            kwargs["hidden_states"] = hidden + call.deepstack[index - 1].to(hidden.device)
        if index in self.bounds:
            self._cross(call, index, kwargs)
        if call.changed:
            # Positions live in the rotary tables; Flash Attention must not read gaps in position_ids as packing.
            kwargs["position_ids"] = None
            if call.rope is not None:
                kwargs["position_embeddings"] = call.rope
            if call.group:
                kwargs["attention_mask"] = self._group_mask(call, index, kwargs)
        if index in self.captures and call.cuts.get(index + 1):
            call.run.signals = self._capture(call, self.captures[index], index, module, kwargs)
        if index in self.transition.indices and any(bound > index for bound in call.cuts):
            self.transition.begin(call.run)
        return (kwargs.pop("hidden_states"),), kwargs  # by position: gradient checkpointing looks for it there

    def _cross(self, call: Call, index: int, kwargs: dict) -> None:
        """Enter the next layer group, cutting on the way."""
        call.group += 1
        call.mask = None
        if call.step:
            return
        cuts = call.cuts.get(index, ())
        if cuts and call.rope is None:
            call.rope = kwargs["position_embeddings"]
        for cut in cuts:
            if "entry_attention" in cut.reducer.signals:
                entering = {**kwargs, "position_embeddings": call.rope}
                found = self._capture(call, ("attention",), index, self.parts.layers[index], entering)
                call.run.signals["entry_attention"] = found["attention"]
            kwargs["hidden_states"] = self._cut(call, cut, kwargs["hidden_states"])
        call.ends.append(Slots(call.run.columns, call.run.valid, call.run.full))

    def _group_mask(self, call: Call, index: int, kwargs: dict):
        """The mask of the current group, made once."""
        if call.mask is None:
            from transformers.masking_utils import create_causal_mask

            hidden, cache = kwargs["hidden_states"], kwargs.get("past_key_values")
            if call.step:
                valid = self._step_mask(call, cache, index, hidden.shape[1])
            else:
                valid, full = self._validity(call, call.group)
                if call.caller.custom is not None:
                    call.mask = (self._custom_mask(call, call.group, valid),)
                    return call.mask[0]
                if not _static(cache) and full:
                    valid = None
            call.mask = (
                create_causal_mask(
                    config=self.parts.decoder.config,
                    inputs_embeds=hidden,
                    attention_mask=valid,
                    past_key_values=cache,
                    position_ids=None,
                    layer_idx=index,
                ),
            )
        return call.mask[0]

    def _capture(self, call: Call, names: tuple[str, ...], index: int, module: nn.Module, kwargs: dict) -> dict:
        at = LayerInput(
            layer=module,
            index=index,
            hidden=kwargs["hidden_states"],
            rope=kwargs["position_embeddings"],
            mask=kwargs.get("attention_mask"),
            valid=call.run.valid,
            past_valid=self._validity(call, call.group)[0][:, : -call.run.valid.shape[1]],
            cache=kwargs.get("past_key_values"),
        )
        return capture(names, at)

    # ------------------------------------------------------------------------------------------ decoder, post
    def after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output):
        call: Call | None = kwargs.get(CALL)
        if call is None or call.step:
            return None
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if call.run.target is not None:
            hidden = take(hidden, forward_fill(call.run.target, hidden.shape[1]).to(hidden.device))
        self.record = call.record or self.record
        cache = kwargs.get("past_key_values")
        if isinstance(output, tuple):
            output = (hidden, *output[1:])
        else:
            output.last_hidden_state = hidden
            cache = output.past_key_values if cache is None else cache
        if cache is not None and len(cache.layers) and cache.layers[0].is_initialized:
            caches.commit(cache, self._ledger(call))
        return output

    def _ledger(self, call: Call) -> caches.Ledger:
        pairs = list(zip(call.cached, call.ends))
        valid = [torch.cat([old.valid, new.valid.to(old.valid.device)], 1) for old, new in pairs]
        return caches.Ledger(
            pruner=self.signature,
            bounds=self.bounds,
            valid=[None if old.full and new.full else v for v, (old, new) in zip(valid, pairs)],
            columns=[torch.cat([old.columns, new.columns.to(old.columns.device) + call.past], 1) for old, new in pairs],
            offset=[call.past + call.width - v.shape[1] for v in valid],
            delta=call.delta,
        )


# ---------------------------------------------------------------------------------------------- helpers
def depth(site: Site) -> int:
    """The decoder layer at whose input a site lies; 0 for everything before the decoder."""
    return site.layer if site.kind == "decoder" else 0


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call as keywords (some models pass `input_ids` or `hidden_states` by position)."""
    if not args:
        return dict(kwargs)
    forward = module.forward
    # A function set on the module itself (accelerate) has a signature of its own, and is not to be kept alive.
    if inspect.ismethod(forward) and not torch.compiler.is_compiling():
        names = _names(forward.__func__)[1:]
    else:
        names = tuple(inspect.signature(forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


@lru_cache(maxsize=256)
def _names(function) -> tuple[str, ...]:
    """Names of a function's arguments; asking takes longer than all else a hook on a decoder layer does."""
    return tuple(inspect.signature(function).parameters)


def drop_call(module: nn.Module, args: tuple, kwargs: dict):
    """Pre-hook on the tower: Qwen-VL hands it the keyword arguments of the whole call."""
    return (args, {name: value for name, value in kwargs.items() if name != CALL}) if CALL in kwargs else None


def _static(cache) -> bool:
    return cache is not None and cache.is_compileable
