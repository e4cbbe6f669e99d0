"""What one forward call carries from hook to hook, inside its keyword arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prune.adapters.cache import Ledger
from prune.adapters.images import Found
from prune.adapters.masks import CallerMask
from prune.adapters.planner import Cut, Question
from prune.adapters.record import Record
from prune.adapters.visual import Running, Visual

CALL = "prune_call"


@dataclass
class Slots:
    """Slots some layers hold: `columns` `[B, n]` int64, `valid` `[B, n]` bool, and whether all are valid."""

    columns: Tensor
    valid: Tensor
    full: bool


@dataclass
class Call:
    """Everything one forward needs.

    Args:
        visual, placeholder: the images and their columns; None in a text-only call on a pruned cache.
        cuts: by the decoder layer they act at (0: before the decoder), those that remove something.
        step: True for text on a pruned cache: only masks and positions need care; `step_mask` is the caller's.
        ledger: of the pruned cache, if it is one.
        caller: the caller's mask, taken apart.
        run: the running sequence; `width` is the caller's length, `past` the logical columns before it.
        cached: per layer group, the slots in the cache.
        changed: whether anything was cut, in this call or earlier in the conversation.
        group: the layer group the forward is in (groups lie between pruning layers).
        ends: per layer group, the new slots, their columns counted from this call's first.
        rope, mask: what the layers of the current group get, if it differs from what the decoder made; the mask in a
            tuple, for None is a mask too.
        deepstack: `[B, L, D]` features to be added after layer 0, 1, ... (Qwen3-VL).
        delta: `[A, B]` shift of later position ids ("compact" positions).
        record: becomes the engine's when the forward succeeds.
        question: to be checked before the decoder runs.
        found: the images, until the signals of the vision encoder are known (transformers < 5.18: in this very call).
    """

    visual: Visual | None = None
    placeholder: Tensor | None = None
    cuts: dict[int, list[Cut]] = field(default_factory=dict)
    step: bool = False
    step_mask: object = None
    ledger: Ledger | None = None
    caller: CallerMask | None = None
    run: Running | None = None
    width: int = 0
    past: int = 0
    cached: list[Slots] = field(default_factory=list)
    changed: bool = False
    group: int = 0
    ends: list[Slots] = field(default_factory=list)
    rope: tuple[Tensor, Tensor] | None = None
    mask: tuple | None = None
    deepstack: list[Tensor] = field(default_factory=list)
    delta: Tensor | None = None
    record: Record | None = None
    found: Found | None = None
    question: Question | None = None
