"""Model code: the family table and the hook engine; imported as `prune.adapters`."""

from __future__ import annotations

from torch import nn

from prune.adapters.engine import Engine, attached
from prune.adapters.families import FAMILIES, SIGNAL_DECODERS, Family
from prune.adapters.signals import CAPTURES
from prune.adapters.structure import Parts, find_parts
from prune.budget import Budget
from prune.errors import AlreadyAttachedError, ConfigError, UnsupportedMethodError
from prune.method import Method
from prune.registry import list_methods

__all__ = ["FAMILIES", "Engine", "Family", "attach", "attached"]


def attach(model: nn.Module, method: Method, budget: Budget | None, positions: str) -> Engine:
    """Check everything, then register the hooks. See `prune.apply_pruner` for the errors."""
    engine = attached(model)
    if engine is not None:
        raise AlreadyAttachedError(
            f"this model already carries {engine.method!r}; call handle.remove() first "
            "(prune.get_handle(model) finds the handle), or attach Compose(first, second)"
        )
    parts = find_parts(model)
    _check(parts, method, positions)
    return Engine(parts, method, budget, positions).attach()


def _check(parts: Parts, method: Method, positions: str) -> None:
    """Refuse what would fail later.

    Raises:
        ConfigError: a site outside the decoder, "compact" positions inside it.
        UnsupportedMethodError: a site or signal this model has not got.
    """
    layers, works = len(parts.layers), ", ".join(list_methods(signals=set()))
    for stage in method.plan(parts.geometry(100), 10):
        site, signals = stage.site, [name for name in stage.reducer.signals if name in CAPTURES]
        if site.kind not in ("projected", "decoder"):
            raise UnsupportedMethodError(f"{stage.reducer.name} acts at {site}, which the engine does not serve yet")
        if site.kind == "decoder" and site.layer >= layers:
            raise ConfigError(f"layer={site.layer} is out of range: this decoder has layers 0 to {layers - 1}")
        if signals and (site.kind == "projected" or site.layer == 0):
            raise UnsupportedMethodError(
                f"{stage.reducer.name} reads {', '.join(signals)} of the decoder layer before {site}, and there is "
                f"none; use layer>=1, or a method that needs no signal: {works}"
            )
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
