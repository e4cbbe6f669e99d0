"""Attach a method to a vision transformer: place it at blocks, and refuse what would fail later."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prune.adapters.vit_engine import Blocks
from prune.adapters.vit_families import VitParts
from prune.adapters.vit_signals import AT_BLOCKS, OF_ATTENTION, layers_ran, resolve
from prune.budget import Budget, Geometry
from prune.compose import Compose
from prune.errors import ConfigError, PruneError, UnsupportedMethodError
from prune.method import Method, Site, Stage
from prune.registry import get_method, list_methods


@dataclass
class Moved(Method):
    """A one-stage method at the input of a block, wherever it acts in a vision-language model."""

    inner: Method
    block: int

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        site = Site.parse(f"block:{self.block}")
        return tuple(replace(stage, site=site) for stage in self.inner.plan(geometry, keep))


def attach_vit(
    parts: VitParts,
    method: Method,
    budget: Budget | None,
    positions: str | None,
    restore: bool,
    proportional: bool | None,
    block: int | None,
) -> Blocks:
    """Check everything, then register the hooks. See `prune.apply_pruner` for arguments and errors."""
    if positions is not None:
        raise ConfigError(
            "a vision transformer knows no position policy: patches carry their place with them; leave positions out"
        )
    planner, counts_sizes = checked(parts, method, restore, proportional, block, advise=True)
    engine = Blocks(parts, method, planner, budget, restore, counts_sizes)
    given = {"block": block, "restore": restore or None, "proportional": proportional}
    engine.arguments = {name: value for name, value in given.items() if value is not None}
    return engine.attach()


def works_on(parts: VitParts) -> list[str]:
    """Names of the methods that `apply_pruner` takes on this model with default options."""
    return [name for name in list_methods() if _fits(parts, get_method(name))]


def _fits(parts: VitParts, method: Method) -> bool:
    try:
        checked(parts, method)
    except PruneError:
        return False
    return True


def checked(
    parts: VitParts,
    method: Method,
    restore: bool = False,
    proportional: bool | None = None,
    block: int | None = None,
    advise: bool = False,
) -> tuple[Method, bool]:
    """The method placed at blocks, and whether attention counts sizes.

    Args:
        advise: whether a refusal lists the methods that work.

    Raises:
        ConfigError: blocks out of range or out of order, `block` for a method that places itself.
        UnsupportedMethodError: a site, signal or kind of attention this model has not got.
    """
    try:
        planner = at_blocks(method, len(parts.blocks), block)
        stages = planner.plan(parts.geometry(100), 10)
        if proportional is None:
            proportional = any(stage.reducer.proportional for stage in stages)
        for stage in stages:
            _check_site(parts, stage)
            _check_signals(parts, stage)
        order = [(stage.site.layer, stage.reducer.place == "inside") for stage in stages]
        if any(second <= first for first, second in zip(order, order[1:])):
            raise ConfigError(f"the stages of {method.name} must ascend, got {', '.join(str(s.site) for s in stages)}")
        _check_attention(parts, method, stages, proportional)
        if stages[-1].reducer.adaptive and not restore and not parts.cls_only:
            raise UnsupportedMethodError(
                f"{method.name} keeps different numbers of patches in the images of a batch, and this model pools over "
                "all of them, padding too; pass restore=True"
            )
    except UnsupportedMethodError as error:
        if not advise:
            raise
        works = ", ".join(works_on(parts)) or "none"
        raise UnsupportedMethodError(f"{error}; methods that work on this model: {works}") from None
    return planner, proportional


def at_blocks(method: Method, layers: int, block: int | None) -> Method:
    """The method, moved to a block if it is written for the decoder of a vision-language model.

    Methods that plan `block:i` sites stay as they are. One that acts once is moved to the input of `block`: None is
    block k for one at `decoder:k`, a third of the depth for one at `projected`.

    Raises:
        UnsupportedMethodError: it acts several times, and not at blocks.
        ConfigError: `block` is out of range, or for a method that places itself.
    """
    sites = method.sites(layers)
    if all(site.kind == "block" for site in sites):
        if block is not None:
            raise ConfigError(
                f"{method.name} places itself at {sites[0]} and so on; block={block!r} is for other methods"
            )
        return method
    if isinstance(method, Compose) or len(sites) != 1 or sites[0].kind == "vision":
        raise UnsupportedMethodError(
            f"{method.name} acts at {', '.join(map(str, sites))}; on a vision transformer a method acts at blocks, or "
            "once, and is then moved to a block"
        )
    if block is None:
        block = sites[0].layer if sites[0].kind == "decoder" else layers // 3
    if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < layers:
        raise ConfigError(f"block={block!r} is out of range: this model has blocks 0 to {layers - 1}; pass block=")
    return Moved(method, block)


def _check_site(parts: VitParts, stage: Stage) -> None:
    count, reducer = len(parts.blocks), stage.reducer
    if stage.site.layer >= count:
        raise ConfigError(f"{reducer.name} acts at {stage.site}, and this model has blocks 0 to {count - 1}")
    if reducer.place not in ("input", "inside"):
        raise ConfigError(f"place={reducer.place!r} of {reducer.name} must be 'input' or 'inside'")


def _check_signals(parts: VitParts, stage: Stage) -> None:
    reducer, wanted = stage.reducer, set(stage.reducer.signals)
    if missing := sorted(wanted - AT_BLOCKS):
        raise UnsupportedMethodError(
            f"{reducer.name} reads {', '.join(missing)}, which exists in vision-language models only"
        )
    if reducer.needs_projector:
        raise UnsupportedMethodError(f"{reducer.name} reads a projector, and this model has none")
    if wanted & OF_ATTENTION and layers_ran(stage) == 0:
        raise UnsupportedMethodError(
            f"{reducer.name} reads {', '.join(sorted(wanted & OF_ATTENTION))} of the block before {stage.site}, and "
            "there is none; use block>=1"
        )
    if "attention" in wanted and reducer.reads_last and not parts.cls:
        raise UnsupportedMethodError(
            f"{reducer.name} reads the attention of one token, on a vision transformer of CLS, and {parts.family.name} "
            "has none"
        )
    for spec in reducer.tower.values():
        resolve(parts, spec, stage)


def _check_attention(parts: VitParts, method: Method, stages: tuple[Stage, ...], proportional: bool) -> None:
    """Refuse padding and sizes where attention takes no additive mask."""
    adaptive = any(stage.reducer.adaptive for stage in stages)
    if not (adaptive or proportional):
        return
    why = "padding hidden from attention" if adaptive else "attention to count sizes"
    instead = "use a method that keeps a fixed number of patches" if adaptive else "pass proportional=False"
    if any(part.mask_argument is None for part in parts.blocks):
        raise UnsupportedMethodError(
            f"{method.name} wants {why}, and the attention of {parts.family.name} takes no mask in this version of "
            f"transformers; upgrade it, or {instead}"
        )
    if any(part.flash for part in parts.blocks):
        raise UnsupportedMethodError(
            f"{method.name} wants {why}, and Flash Attention takes no such mask; load the model with "
            f"attn_implementation='sdpa', or {instead}"
        )
