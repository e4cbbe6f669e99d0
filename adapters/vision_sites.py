"""Reduction inside the vision encoder of a vision-language model, by the engine for vision transformers.

The encoder's blocks work on the patches that are left, and hand out all features again (`restore=True`), because the
model counts them. Which patches were left travels on the encoder's output like a signal; at `projected`, `Survivors`
removes the others. Encoders that pack the images of a call into one sequence have cuts of their own, `packed_blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from prune.adapters import packing
from prune.adapters.base import Attachment
from prune.adapters.packed_blocks import PackedBlocks, check_packed
from prune.adapters.structure import Parts
from prune.adapters.vit import checked
from prune.adapters.vit_engine import Blocks
from prune.adapters.vit_families import VitParts, find_vit
from prune.adapters.vit_signals import OF_ATTENTION
from prune.budget import Budget, Geometry
from prune.errors import BudgetError, UnsupportedMethodError
from prune.kernels.merging import chosen_indices
from prune.kernels.topk import to_device
from prune.method import Method, Reducer, Site, Stage, alive
from prune.tokens import ALIVE, Reduction, Tower, VisualTokens


def acts_inside(method: Method, parts: Parts) -> bool:
    """Whether a method has stages at blocks of the vision encoder."""
    return any(stage.site.kind == "block" for stage in method.plan(parts.geometry(100), 10))


@dataclass
class Survivors(Reducer):
    """Keeps the tokens whose patch was left in the vision encoder; see there.

    Where tiles are cropped and joined to one image afterwards, as many as the budget allows: if more were left, evenly
    spread ones of them.

    Args:
        varies: whether their number may differ from the count asked for.
    """

    varies: bool = False

    name = "survivors"
    tower: ClassVar[Mapping[str, Tower]] = MappingProxyType({ALIVE: Tower(ALIVE)})

    def __post_init__(self):
        self.adaptive = self.varies

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        left = (tokens.tower[ALIVE] > 0.5) & tokens.mask
        rank, count = left.cumsum(1) - 1, left.sum(1, keepdim=True)
        most = torch.minimum(to_device(list(keep), left.device)[:, None], count)
        number = count.clamp(min=1)
        spread = (rank + 1) * most // number > rank * most // number
        return Reduction(*chosen_indices(left & spread, max(keep, default=0)))


@dataclass
class BehindTower(Method):
    """What is left of a method for the engine of the whole model: the survivors, and later stages."""

    inner: Method
    varies: bool

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        stages = self.inner.plan(geometry, keep)
        inside = [stage for stage in stages if stage.site.kind == "block"]
        survivors = Survivors(self.varies or any(stage.reducer.adaptive for stage in inside))
        return Stage(Site.parse("projected"), survivors, inside[-1].keep), *stages[len(inside) :]


@dataclass
class InTower(Method):
    """The stages of a method at the blocks of the vision encoder, planned for one tile of `parts`."""

    inner: Method
    parts: Parts

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        return _inside(self.inner.plan(self.parts.geometry(geometry.visual_tokens), keep))

    def stages(self, geometry: Geometry, budget: Budget | None) -> tuple[Stage, ...]:
        check_budget(self.parts, budget)
        whole = self.parts.geometry(geometry.visual_tokens)
        if budget is None or budget.average is None:
            return _inside(self.inner.stages(whole, budget))
        behind = BehindTower(self.inner, False)
        return self.plan(whole, budget.solve(whole, lambda keep: alive(whole, behind.plan(whole, keep))))


def _inside(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in stages if stage.site.kind == "block")


class TowerBlocks(Blocks):
    """The cuts inside the vision encoder; `owner` is the engine of the whole model, whose budget and switch hold."""

    def __init__(self, owner, vit: VitParts, planner: InTower, proportional: bool):
        self.owner = owner
        super().__init__(vit, owner.method, planner, owner.budget, True, proportional)

    def open(self, module: nn.Module, args: tuple, kwargs: dict):
        self.enabled, self.budget = self.owner.enabled, self.owner.budget
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.place.alive = torch.ones(hidden.shape[:2], device=hidden.device)
        return super().open(module, args, kwargs)

    def after_block(self, index: int, module: nn.Module, args: tuple, output):
        run = self.place.run
        output = super().after_block(index, module, args, output)
        if run is not None and self.place.run is None and run.done:
            self.place.alive = run.alive()
        return output

    def hands_out(self, index: int) -> bool:
        """Only where the projector reads, and behind the last block."""
        return index in self.owner.parts.read_layers or index == len(self.parts.blocks) - 1

    def take_alive(self) -> Tensor:
        """`[tiles, P + N]` fp32 of the last run in this thread: 1 for prefix tokens and patches left."""
        found, self.place.alive = self.place.alive, None
        return found


def check_budget(parts: Parts, budget: Budget | None) -> None:
    """Refuse budgets that cannot be shared out to tiles before it is known how many an image has.

    Raises:
        BudgetError: names those that can.
    """
    if budget is None:
        raise BudgetError(
            "a Compose with budgets of its own cannot act inside the vision encoder; give apply_pruner one"
        )
    if budget.flops is not None:
        raise BudgetError("flops= counts the prompt, which the vision encoder does not see; give ratio= or keep=")
    if tiled(parts) and (budget.keep is not None or (budget.average or 0) >= 1):
        raise BudgetError(
            f"{parts.family.name} cuts images into tiles, and the vision encoder does not see how many an image has; "
            "give ratio=, or average= as a share below 1"
        )


def tiled(parts: Parts) -> bool:
    """Whether an image may have several tiles, which are cropped and joined behind the encoder."""
    return parts.family.pack_image is not packing.plain


def vit_of(parts: Parts, method: Method) -> VitParts:
    """The vision encoder as the engine for vision transformers knows it.

    Raises:
        UnsupportedMethodError: it does not know it.
    """
    vit = find_vit(parts.tower)
    if vit is None:
        kind = getattr(getattr(parts.tower, "config", None), "model_type", type(parts.tower).__name__)
        raise UnsupportedMethodError(
            f"{method.name} acts inside the vision encoder, which is served for CLIP, SigLIP and Qwen-VL only, not for "
            f"{kind}; use a method that acts at projected or in the decoder"
        )
    return vit


def packed(parts: Parts) -> bool:
    """Whether the encoder runs all images as one sequence, and joins patches that follow each other to one token."""
    return parts.tower_shape is not None and parts.tower_shape.joined == "consecutive"


def cuts_of(owner, inner: Method, proportional: bool) -> Attachment:
    """The cuts of `inner` inside the vision encoder of the engine `owner`, with hooks to `attach`."""
    planner = InTower(inner, owner.parts)
    if packed(owner.parts):
        return PackedBlocks(owner, owner.parts, planner)
    return TowerBlocks(owner, vit_of(owner.parts, owner.method), planner, proportional)


def check_inside(parts: Parts, inner: Method, budget: Budget | None, proportional: bool | None) -> bool:
    """All checks of the stages inside the encoder; whether attention counts sizes.

    Raises:
        BudgetError, ConfigError, UnsupportedMethodError: see `prune.apply_pruner`.
    """
    stages = inner.plan(parts.geometry(100), 10)
    vit = None if packed(parts) else vit_of(parts, stages[0].reducer)
    check_budget(parts, budget)
    later = stages[len(_inside(stages)) :]
    if any(stage.site.kind == "block" for stage in later):
        raise UnsupportedMethodError(f"the stages of {inner.name} inside the vision encoder must come first")
    for stage in later:
        for spec in stage.reducer.tower.values():
            if spec.kind not in ("features", "pixels"):
                raise UnsupportedMethodError(
                    f"{stage.reducer.name} reads {spec.kind} of the vision encoder, and another stage drops patches "
                    "inside it; use a method that reads none of its attention"
                )
        if set(stage.reducer.signals) & OF_ATTENTION == {"block"}:
            raise UnsupportedMethodError(f"{stage.reducer.name} reads a block's attention at {stage.site}")
    if vit is None:
        check_packed(parts, _inside(stages), proportional)
        return False
    return checked(vit, InTower(inner, parts), restore=True, proportional=proportional)[1]
