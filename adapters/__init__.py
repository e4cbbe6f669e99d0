"""Model code: the family table and the hook engine; imported as `prune.adapters`."""

from __future__ import annotations

from torch import nn

from prune.adapters.base import Attachment, attached
from prune.adapters.engine import Engine
from prune.adapters.families import FAMILIES, SIGNAL_DECODERS, Family
from prune.adapters.signals import CAPTURES
from prune.adapters.structure import Parts, find_parts
from prune.adapters.tower import methods_for_decoders, tower_of
from prune.adapters.vision_sites import BehindTower, acts_inside, check_inside
from prune.adapters.vit import at_blocks, attach_vit
from prune.adapters.vit_engine import Blocks
from prune.adapters.vit_families import VIT_FAMILIES, VitFamily, find_vit
from prune.budget import Budget
from prune.errors import AlreadyAttachedError, ConfigError, UnsupportedMethodError
from prune.method import Method, Stage

IN_DECODER = {*CAPTURES, "entry_attention", "transition"}
"""Signals that exist only after a decoder layer, or at its input."""

__all__ = [
    "FAMILIES",
    "VIT_FAMILIES",
    "Attachment",
    "Blocks",
    "Engine",
    "Family",
    "VitFamily",
    "attach",
    "attached",
    "find_vit",
]


def attach(
    model: nn.Module,
    method: Method,
    budget: Budget | None,
    positions: str | None,
    restore: bool = False,
    proportional: bool | None = None,
    block: int | None = None,
) -> Attachment:
    """Check everything, then register the hooks. See `prune.apply_pruner` for the errors."""
    engine = attached(model)
    if engine is not None:
        raise AlreadyAttachedError(
            f"this model already carries {engine.method!r}; call handle.remove() first "
            "(prune.get_handle(model) finds the handle), or attach Compose(first, second)"
        )
    if (vit := find_vit(model)) is not None:
        return attach_vit(vit, method, budget, positions, restore, proportional, block)
    parts = find_parts(model)
    if restore:
        raise ConfigError("restore=True is for vision transformers; inside a vision-language model it is always so")
    inner = method if block is None else at_blocks(method, parts.geometry(0).tower_layers, block)
    positions = positions or method.positions
    if not acts_inside(inner, parts):
        if proportional is not None:
            raise ConfigError(f"proportional={proportional!r} is for methods that act inside the vision encoder")
        _check(parts, method, positions)
        return Engine(parts, method, budget, positions).attach()
    counts_sizes = check_inside(parts, inner, budget, proportional)
    _check(parts, BehindTower(inner, False), positions)
    engine = Engine(parts, method, budget, positions, inner, counts_sizes)
    given = {"block": block, "proportional": proportional}
    engine.arguments = {name: value for name, value in given.items() if value is not None}
    return engine.attach()


def _check(parts: Parts, method: Method, positions: str) -> None:
    """Refuse what would fail later.

    Raises:
        ConfigError: a site outside the decoder, "compact" positions inside it, a layer out of range.
        UnsupportedMethodError: a site or signal this model has not got.
    """
    layers, works = len(parts.layers), ", ".join(methods_for_decoders(set()))
    stages = method.plan(parts.geometry(100), 10)
    for stage in stages:
        site, signals = stage.site, [name for name in stage.reducer.signals if name in IN_DECODER]
        if site.kind not in ("projected", "decoder"):
            raise UnsupportedMethodError(f"{stage.reducer.name} acts at {site}, which vision-language models have not")
        if site.kind == "decoder" and site.layer >= layers:
            raise ConfigError(f"layer={site.layer} is out of range: this decoder has layers 0 to {layers - 1}")
        if signals and (site.kind == "projected" or site.layer == 0):
            raise UnsupportedMethodError(
                f"{stage.reducer.name} reads {', '.join(signals)} of the decoder layer before {site}, and there is "
                f"none; use layer>=1, or a method that needs no signal: {works}"
            )
        if "transition" in signals:
            _check_transition(stage, layers)
        if positions == "compact" and site.kind == "decoder":
            raise ConfigError(
                f'positions="compact" needs all pruning before the decoder, and {stage.reducer.name} acts at {site}; '
                'use positions="original"'
            )
        kind = parts.decoder.config.model_type
        if signals and kind not in SIGNAL_DECODERS:
            raise UnsupportedMethodError(
                f"{stage.reducer.name} reads {', '.join(signals)}, which is known to be right for the decoders "
                f"{', '.join(SIGNAL_DECODERS)} only, not for {kind!r}; methods that need no signal: {works}"
            )
    tower_of(parts, stages, None)


def _check_transition(stage: Stage, layers: int) -> None:
    wanted = stage.reducer.transition_layers
    if any(not 0 <= layer < layers for layer in wanted):
        raise ConfigError(f"transition_layers={wanted} are out of range: this decoder has layers 0 to {layers - 1}")
    if not any(layer < stage.site.layer for layer in wanted):
        raise ConfigError(
            f"{stage.reducer.name} reads the transition of layers {wanted}, and none of them runs before {stage.site}; "
            "give transition_layers below it"
        )
