"""What a reducer is shown: the images' features at the site and the signals it declares, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prune.adapters.positions import last_valid
from prune.adapters.signals import Projections
from prune.adapters.structure import Parts
from prune.adapters.tower import Key, resolve
from prune.adapters.visual import Running
from prune.errors import ConfigError
from prune.kernels.compaction import compact, take
from prune.method import Reducer
from prune.tokens import AttentionInputs, Projector, Reduction, VisualTokens

PROJECTOR_READS: Key = ("features", None)


@dataclass
class Shown:
    """The running sequence at one site, as `hidden` `[B, L, D]` comes in."""

    parts: Parts
    run: Running
    hidden: Tensor

    def tokens(self, reducer: Reducer) -> VisualTokens:
        run, visual, wanted, hidden = self.run, self.run.visual, reducer.signals, self.hidden.detach()
        norm = getattr(self.parts.decoder, "norm", None)
        tokens = VisualTokens(
            features=visual.gather(hidden),
            mask=visual.mask,
            coordinates=take(visual.places, visual.token),
            columns=run.ordinal[visual.sample[:, None], visual.columns],
            index=visual.token,
            tile=visual.tile.gather(1, visual.token),
            patch=take(visual.patch, visual.token),
            memory=visual.memory,
        )
        for name in wanted:
            signal = run.signals.get(name)
            if isinstance(signal, Projections):
                setattr(tokens, name, self._attention(signal))
            elif signal is not None:
                setattr(tokens, name, visual.gather(signal))
        for name, spec in reducer.tower.items():
            tokens.tower[name] = visual.of_tower(resolve(self.parts, spec, reducer.name)).detach()
        if reducer.needs_projector:
            tokens.projector = Projector(self.parts.project, self.parts.projector_layers)
        if "normed_features" in wanted:
            tokens.normed_features = norm(tokens.features)
        if "transition" in wanted:
            done = [run.transitions[layer] for layer in reducer.transition_layers if layer in run.transitions]
            tokens.transition = torch.stack([visual.gather(measured) for measured, _ in done], 2)
            tokens.transition_sums = torch.stack([sums for _, sums in done], 1)[visual.sample]
        if {"text_features", "inputs"} & set(wanted):
            self._add_text(tokens, wanted, norm)
        return tokens

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """Slots and validity `[B, T]` of the text after every image."""
        run, visual, width = self.run, self.run.visual, self.hidden.shape[1]
        last = torch.where(visual.mask, visual.columns, -1).amax(1, keepdim=True)
        after = (run.valid & ~run.placeholder)[visual.sample] & (run.columns[visual.sample] > last)
        most = width - min(visual.counts) if visual.exact else width  # text columns a sample can have
        source, valid, _ = compact(after, most)
        return source, valid

    def _add_text(self, tokens: VisualTokens, wanted: tuple[str, ...], norm) -> None:
        run, visual, (source, valid) = self.run, self.run.visual, self.text
        row = visual.sample[:, None]
        columns = run.columns[visual.sample].gather(1, source)
        tokens.text_mask, tokens.text_columns = valid, run.ordinal[row, columns]
        if "inputs" in wanted:
            inputs = run.inputs.to(self.hidden.device)
            tokens.inputs, tokens.text_inputs = inputs[row, visual.columns], inputs[row, columns]
        if "text_features" in wanted:
            tokens.text_features = self.hidden.detach()[row, source]
            if "keys" in wanted:
                tokens.text_keys = run.signals["keys"][row, source]
            if "normed_features" in wanted:
                tokens.normed_text = norm(tokens.text_features)

    def _attention(self, found: Projections) -> AttentionInputs:
        run, visual, (source, valid) = self.run, self.run.visual, self.text
        return AttentionInputs(
            queries=found.queries,
            keys=found.keys,
            values=found.values,
            valid=run.valid,
            scale=found.scale,
            sample=visual.sample,
            slots=visual.slots,
            text_slots=source,
            text_mask=valid,
            last=last_valid(run.valid)[:, 0],
        )

    def merge(self, reduction: Reduction, projected: bool) -> Tensor | None:
        """The kept features `[S, K, D]` with what was folded into them, or None if nothing was.

        Raises:
            ConfigError: a merge in the space of the tower after the decoder has begun.
        """
        if (merge := reduction.merge) is None:
            return None
        visual = self.run.visual
        features = visual.gather(self.hidden)
        if merge.space == "here":
            return reduction.apply(features)
        if not projected:
            raise ConfigError('Merge.space="tower" works at the site projected only; use space="here"')
        folded = self.parts.project(reduction.apply(visual.of_tower(PROJECTOR_READS))).to(features)
        receives = torch.zeros(reduction.keep.shape, device=features.device)
        receives = receives.scatter_add(1, merge.slot, (merge.weight != 0).to(receives)) > 0
        if merge.scale is not None:
            receives = receives | (merge.scale != 1)
        return torch.where(receives[..., None], folded, take(features, reduction.keep))
