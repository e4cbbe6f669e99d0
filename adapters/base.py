"""What every engine is to a `prune.Handle`, whatever the model."""

from __future__ import annotations

from torch import nn

from prune.budget import Budget
from prune.method import Method


class Attachment:
    """A pruner on a model: the hooks, and what the handle shows and changes.

    Attributes:
        method, budget: as given; `budget` may be changed between forwards.
        enabled: False switches it off.
        record: of the last forward that pruned; has a `report()`.
        positions: policy to save with the pruner, or None where the model has no such choice.
        family: name of the model family, "unknown" outside the tables.
        arguments: of `apply_pruner`, for vision transformers, to save with the pruner.
        saved: the `prune.PrunerConfig` it was attached from, if any, so that a re-save keeps what else that says.
        takes_visual_mask: whether `handle.visual_mask` means anything.
    """

    positions: str | None = None
    family = "unknown"
    takes_visual_mask = False
    saved: object | None = None

    def __init__(self, method: Method, budget: Budget | None):
        self.method, self.budget = method, budget
        self.enabled, self.record = True, None
        self.arguments: dict[str, object] = {}
        self._hooks: list = []

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def attached(model: nn.Module) -> Attachment | None:
    """The pruner whose hooks a model carries, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Attachment):
                return owner
    return None
