"""The hook engine: cuts visual tokens out of an unmodified Hugging Face vision-language model.

Hooks, in the order a forward meets them:

    core     pre   find the images and plan the cuts -> a `Call`, which travels on inside the call's kwargs
    decoder  pre   cuts before layer 0; rewrites embeddings, mask, positions; takes over deepstack features
    layer i  pre   cuts at layer i; hands the layer the mask and rotary tables of its own, shorter sequence
    decoder  post  gives the hidden states the caller's length again; writes the ledger to the cache

What one call needs lives in its `Call`, what a conversation needs in the `Ledger` on its cache: no globals, so threads
do not meet and an exception leaves nothing behind. Every hook returns None - touches nothing - in a call that has no
images and no pruned cache.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import Tensor, nn

from prune.adapters import cache as caches
from prune.adapters.call import CALL, Call
from prune.adapters.images import find_images, keep_grid
from prune.adapters.masks import gather_custom, take_apart
from prune.adapters.planner import Cut, check_question, plan
from prune.adapters.record import Record, bytes_per_value
from prune.adapters.signals import LayerInput, capture
from prune.adapters.structure import Parts
from prune.adapters.visual import Running, locate
from prune.budget import Budget
from prune.errors import UnsupportedModelError
from prune.kernels.compaction import dense_rank, forward_fill, take
from prune.method import Method, Site


class Engine:
    """One pruner on one model. Users hold a `prune.Handle`."""

    def __init__(self, parts: Parts, method: Method, budget: Budget | None, positions: str):
        self.parts, self.method, self.budget, self.positions = parts, method, budget, positions
        sites = method.sites(len(parts.layers))
        self.bounds = tuple(dict.fromkeys(depth(site) for site in sites if depth(site) > 0))
        # layer -> signals to take at its input for the cut at the next one
        self.captures = {
            depth(stage.site) - 1: stage.reducer.signals
            for stage in method.plan(parts.geometry(100), 10)
            if stage.reducer.signals
        }
        self.signature = f"{method!r} with {positions} positions"
        self.enabled = True
        self.visual_mask: Tensor | None = None
        self.record: Record | None = None
        self._hooks: list = []

    # ------------------------------------------------------------------------------------------ attach and detach
    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self) -> Engine:
        parts, hooks = self.parts, self._hooks
        hooks.append(parts.core.register_forward_pre_hook(self.before_core, with_kwargs=True))
        if "grid_thw" in inspect.signature(parts.tower.forward).parameters:
            hooks.append(parts.tower.register_forward_pre_hook(drop_call, with_kwargs=True))
            hooks.append(parts.tower.register_forward_hook(keep_grid, with_kwargs=True))
        hooks.append(parts.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
        for index, layer in enumerate(parts.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self.before_layer, index), with_kwargs=True))
        hooks.append(parts.decoder.register_forward_hook(self.after_decoder, with_kwargs=True))
        return self

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

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
            self._plan(call, found, _new_valid(kwargs.get("attention_mask"), inputs))
        if call.ledger is None and not call.cuts:
            self.record = call.record or self.record
            return None if found is None else ((), kwargs)
        return (), {**kwargs, CALL: call}

    def _plan(self, call: Call, found, valid: Tensor) -> None:
        call.placeholder = found.placeholder
        if self.method.needs_question:
            check_question(self.method, call.placeholder, valid)
        call.visual = locate(found.groups, self.method.newlines)
        for cut in plan(self.parts, self.method, self.budget, call.visual, valid):
            call.cuts.setdefault(depth(cut.site), []).append(cut)
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
        kwargs["position_ids"] = _shift(positions, ledger.delta)
        kwargs["attention_mask"] = self._step_mask(call, cache, 0, length)
        # With one query and one layer group the decoder's own mask and positions are right for every layer.
        return {**kwargs, CALL: call} if self.bounds or length > 1 else kwargs

    def _step_mask(self, call: Call, cache, layer: int, length: int) -> Tensor | None:
        """Validity of exactly as many columns as the layer's keys have: SDPA reads a mask from the left, Flash
        Attention from the right."""
        ledger = call.ledger
        group = ledger.group(layer)
        if ledger.valid[group] is None:
            return None
        slots = cache.layers[layer].max_cache_len if _static(cache) else caches.slots_of(cache, layer) + length
        return ledger.validity(group, slots)

    def _open(self, call: Call, kwargs: dict) -> None:
        """Set up the running sequence and what is known of the cached columns."""
        embeds, cache, ledger = kwargs["inputs_embeds"], kwargs.get("past_key_values"), call.ledger
        batch, call.width, _ = embeds.shape
        device, groups = embeds.device, len(self.bounds) + 1
        slots = caches.slots_of(cache, 0)
        call.past = slots if ledger is None else slots + ledger.offset[0]
        call.caller = take_apart(kwargs.get("attention_mask"), batch, call.width, call.past, device, _static(cache))
        if ledger is None:
            call.past_valid = [call.caller.past] * groups
            call.past_full = [call.past == 0 or call.caller.past_full()] * groups
            call.past_columns = [torch.arange(call.past, device=device).expand(batch, -1)] * groups
        else:
            call.changed, call.delta = True, ledger.delta
            for group, offset in enumerate(ledger.offset):
                slots = call.past - offset
                valid = ledger.validity(group, slots)
                full = torch.ones(batch, slots, dtype=torch.bool, device=device)
                call.past_valid.append(full if valid is None else valid.to(device))
                call.past_full.append(valid is None)
                call.past_columns.append(ledger.logical(group, slots).to(device))
        placeholder = call.placeholder
        if placeholder is None:
            placeholder = torch.zeros(batch, call.width, dtype=torch.bool, device=device)
        columns = torch.arange(call.width, device=device).expand(batch, -1)
        new = call.caller.new
        ordinal = new.cumsum(1) - 1
        call.run = Running(columns, ordinal, new, call.caller.new_full(), placeholder.to(device), call.visual)
        deepstack = kwargs.get("deepstack_visual_embeds")
        if deepstack is not None and len(deepstack):
            self._take_over_deepstack(call, kwargs)
        caches.mark_interrupted(cache)

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
        for cut in call.cuts.get(0, ()):
            embeds = self._cut(call, cut, embeds)
        call.ends.append((run.columns, run.valid, run.full))
        if not call.changed:
            return
        positions = kwargs.get("position_ids")
        if positions is None:  # what the decoder would have made
            positions = (torch.arange(call.width, device=embeds.device) + call.past)[None]
        axes = _shift(positions if positions.dim() == 3 else positions[None], call.delta)
        axes = axes.to(embeds.device).expand(-1, len(embeds), -1)
        if run.target is not None:
            last = axes[..., -1]
            axes = take(axes, run.columns, dim=2)
            if self.positions == "compact":
                axes = _compact(axes, run.valid)
                shift = axes[..., -1] - last  # later tokens count on from the caller's last position
                call.delta = shift if call.delta is None else call.delta + shift
        valid = torch.cat([call.past_valid[0], run.valid], 1)
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = axes if positions.dim() == 3 else axes[0]
        if call.caller.custom is not None:
            kwargs["attention_mask"] = self._custom_mask(call, 0, valid)
        else:
            # Without a cache a mask must be there: gaps in the position ids would be read as packed sequences.
            spare = cache is not None and not _static(cache) and run.full and call.past_full[0]
            kwargs["attention_mask"] = None if spare else valid.long()

    def _cut(self, call: Call, cut: Cut, hidden: Tensor) -> Tensor:
        norm = getattr(self.parts.decoder, "norm", None)
        hidden, source = call.run.cut(hidden, cut.site, cut.reducer, cut.keep, norm)
        call.deepstack = [take(features, source) for features in call.deepstack]
        if call.rope is not None:
            call.rope = tuple(take(table, source, dim=table.dim() - 2) for table in call.rope)
        call.changed = True
        return hidden

    def _custom_mask(self, call: Call, group: int, valid: Tensor) -> Tensor:
        columns = torch.cat([call.past_columns[group], call.run.columns + call.past], 1)
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
            self._capture(call, index, module, kwargs)
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
            kwargs["hidden_states"] = self._cut(call, cut, kwargs["hidden_states"])
        call.ends.append((call.run.columns, call.run.valid, call.run.full))

    def _group_mask(self, call: Call, index: int, kwargs: dict):
        """The mask of the current group, made once."""
        if call.mask is None:
            from transformers.masking_utils import create_causal_mask

            hidden, cache = kwargs["hidden_states"], kwargs.get("past_key_values")
            if call.step:
                valid = self._step_mask(call, cache, index, hidden.shape[1])
            else:
                new = call.run.valid
                valid = torch.cat([call.past_valid[call.group].to(new.device), new], 1)
                if call.caller.custom is not None:
                    call.mask = (self._custom_mask(call, call.group, valid),)
                    return call.mask[0]
                if not _static(cache) and call.run.full and call.past_full[call.group]:
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

    def _capture(self, call: Call, index: int, module: nn.Module, kwargs: dict) -> None:
        at = LayerInput(
            layer=module,
            index=index,
            hidden=kwargs["hidden_states"],
            rope=kwargs["position_embeddings"],
            mask=kwargs.get("attention_mask"),
            valid=call.run.valid,
            past_valid=call.past_valid[call.group],
            cache=kwargs.get("past_key_values"),
        )
        call.run.signals = capture(self.captures[index], at)

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
        valid = [torch.cat([past, new.to(past.device)], 1) for past, (_, new, _) in zip(call.past_valid, call.ends)]
        columns = [
            torch.cat([past, new.to(past.device) + call.past], 1)
            for past, (new, _, _) in zip(call.past_columns, call.ends)
        ]
        full = [past and new for past, (_, _, new) in zip(call.past_full, call.ends)]
        return caches.Ledger(
            pruner=self.signature,
            bounds=self.bounds,
            valid=[None if all_valid else v for v, all_valid in zip(valid, full)],
            columns=columns,
            offset=[call.past + call.width - v.shape[1] for v in valid],
            delta=call.delta,
        )


# ---------------------------------------------------------------------------------------------- helpers
def attached(model: nn.Module) -> Engine | None:
    """The engine whose hooks a model carries, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            engine = getattr(hook, "__self__", None)
            if isinstance(engine, Engine):
                return engine
    return None


def depth(site: Site) -> int:
    """The decoder layer at whose input a site lies; 0 for everything before the decoder."""
    return site.layer if site.kind == "decoder" else 0


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call as keywords (some models pass `input_ids` or `hidden_states` by position)."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def drop_call(module: nn.Module, args: tuple, kwargs: dict):
    """Pre-hook on the tower: Qwen-VL hands it the keyword arguments of the whole call."""
    return (args, {name: value for name, value in kwargs.items() if name != CALL}) if CALL in kwargs else None


def _static(cache) -> bool:
    return cache is not None and cache.is_compileable


def _new_valid(mask, inputs: Tensor) -> Tensor:
    """`[B, L]` bool validity of the new columns, as far as a 2-D mask tells."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -inputs.shape[1] :].bool().to(inputs.device)
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def _shift(positions: Tensor, delta: Tensor | None) -> Tensor:
    """Add the shift `[A, B]` of "compact" positions to `[B, L]` or `[A, B, L]` position ids."""
    if delta is None:
        return positions
    delta = delta.to(positions.device)[..., None]
    return positions + (delta if positions.dim() == 3 else delta[0])


def _compact(axes: Tensor, valid: Tensor) -> Tensor:
    """Renumber `[A, B, L]` positions; of four axes the first counts text and is numbered on its own."""
    if len(axes) == 4:
        return torch.cat([dense_rank(axes[:1], valid), dense_rank(axes[1:], valid)])
    return dense_rank(axes, valid)
