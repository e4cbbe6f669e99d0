"""Run several methods one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune.budget import Budget, Geometry
from prune.errors import ConfigError
from prune.method import Method, Site, Stage

DEPTHS = (16, 32, 64)
"""Decoder layers of small and large models. What fits none of them is refused before there is a model."""


@dataclass(init=False)
class Compose(Method):
    """Methods in sequence, each acting on what the one before left over.

    Under one budget every member removes the same share of what reaches it, so that the last one meets the budget:
    member j of m leaves N * (K / N) ** (j / m) of N tokens. Give `budgets` to set each member's own instead; a count
    is then relative to what reaches the member, and no budget is passed to `apply_pruner`. Positions are "compact" if
    all members act before the decoder and want them so, else "original".

    Example:
        >>> apply_pruner(model, Compose(get_method("divprune"), get_method("fastv", layer=8)), ratio=0.9)

    Args:
        members: methods in the order data meets them; their sites must ascend. For members that place themselves by the
            depth of the decoder, `apply_pruner` checks that again.
        budgets: one `Budget(ratio=...)` or `Budget(keep=...)` per member.

    Raises:
        ConfigError: fewer than two members, sites that do not ascend, wrong or nested `budgets`.
    """

    members: tuple[Method, ...]
    budgets: tuple[Budget, ...] | None

    name = "compose"

    def __init__(self, *members: Method, budgets: Sequence[Budget] | None = None):
        if len(members) < 2 or not all(isinstance(member, Method) for member in members):
            raise ConfigError("Compose wants at least two method objects, such as two get_method(...)")
        sites = _sites(members, 32)
        if not any(_ascend(_sites(members, layers)) for layers in DEPTHS):
            raise _conflict(sites)
        if any(getattr(member, "budgets", None) is not None for member in members):
            raise ConfigError("a composed method may not carry budgets of its own; list its members and theirs instead")
        if budgets is not None:
            budgets = tuple(budgets) if isinstance(budgets, Sequence) else ()
            known = all(isinstance(budget, Budget) for budget in budgets)
            if not known or len(budgets) != len(members) or any(b.ratio is None and b.keep is None for b in budgets):
                raise ConfigError("budgets wants one Budget(ratio=...) or Budget(keep=...) per member")
        self.members, self.budgets = members, budgets
        self.needs_question = any(member.needs_question for member in members)
        self.adaptive = any(member.adaptive for member in members)
        self.merges = any(member.merges for member in members)
        self.newlines = any(member.newlines for member in members)
        self.signals = tuple(dict.fromkeys(signal for member in members for signal in member.signals))
        self.tower = {f"{i}.{name}": spec for i, m in enumerate(members) for name, spec in m.tower.items()}
        before_decoder = all(site.kind == "projected" for site in sites)
        compact = before_decoder and all(member.positions == "compact" for member in members)
        self.positions = "compact" if compact else "original"

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        return self._chain(geometry, self._split(geometry.visual_tokens, keep))

    def stages(self, geometry: Geometry, budget: Budget | None) -> tuple[Stage, ...]:
        if self.budgets is not None:
            return self._chain(geometry, self.budgets)
        if budget is None:
            raise ConfigError("Compose has no budgets of its own; give apply_pruner one, such as ratio=0.9")
        return super().stages(geometry, budget)

    def _split(self, n: int, keep: int) -> list[Budget]:
        m = len(self.members)
        counts = [max(keep, round(n * (keep / n) ** ((j + 1) / m))) for j in range(m)]
        counts[-1] = keep
        return [Budget(keep=count) for count in counts]

    def _chain(self, geometry: Geometry, budgets: Sequence[Budget]) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        n = geometry.visual_tokens
        for member, budget in zip(self.members, budgets):
            reached = Geometry(**{**vars(geometry), "visual_tokens": n})
            stages += member.plan(reached, budget.solve(reached, lambda k: [k]))
            n = stages[-1].keep
        # Again, for members that scale their layers with the decoder's depth.
        if not _ascend(sites := [stage.site for stage in stages]):
            raise _conflict(sites, f" in a decoder of {geometry.layers} layers")
        return tuple(stages)


def _sites(members: Sequence[Method], layers: int) -> list[Site]:
    return [site for member in members for site in member.sites(layers)]


def _ascend(sites: Sequence[Site]) -> bool:
    return all(a < b for a, b in zip(sites, sites[1:]))


def _conflict(sites: Sequence[Site], where: str = "") -> ConfigError:
    return ConfigError(
        f"the sites of composed methods must ascend, got {', '.join(map(str, sites))}{where}; "
        "change their order or their layers"
    )
