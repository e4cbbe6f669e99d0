"""Turn a budget into counts: which stage keeps how many tokens of every image of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.adapters.positions import last_valid
from prune.adapters.structure import Parts
from prune.adapters.visual import Visual
from prune.budget import Budget
from prune.errors import ConfigError, InputError
from prune.method import Method, Reducer, Site, Stage


@dataclass
class Cut:
    """One stage for all images of a call: `keep[s]` tokens of image s are left."""

    site: Site
    reducer: Reducer
    keep: list[int]


def plan(
    parts: Parts, method: Method, budget: Budget | None, visual: Visual, valid: Tensor, columns: list[int]
) -> list[Cut]:
    """The cuts that remove something, in order.

    Args:
        valid: `[B, L]` bool; a `flops` budget counts the text tokens in it (synchronises if some are hidden).
        columns: how many are valid in every row.

    Raises:
        BudgetError: the budget is out of reach.
        ConfigError: the method acts at a site it did not name when it was attached.
    """
    counts = visual.counts
    if budget is not None and budget.flops is not None:
        stages = _by_flops(parts, method, budget, visual, _text(visual, valid, columns))
    else:
        by_count = {n: method.stages(parts.geometry(n), budget) for n in set(counts)}
        stages = [by_count[n] for n in counts]
    cuts, before, sites = [], counts, {stage.site for stage in method.plan(parts.geometry(100), 10)}
    for number, stage in enumerate(stages[0]):
        if stage.site not in sites:
            raise ConfigError(
                f"{type(method).__name__}.plan moved to {stage.site}; sites may depend on geometry.layers only"
            )
        keep = [min(per_image[number].keep, n) for per_image, n in zip(stages, before)]
        if keep != before:
            cuts.append(Cut(stage.site, stage.reducer, keep))
        before = keep
    return cuts


def _text(visual: Visual, valid: Tensor, columns: list[int]) -> list[int]:
    """Per sample, valid tokens that are not visual ones."""
    if not visual.exact:
        return text_tokens(visual, valid)
    text = list(columns)
    for row, count in zip(visual.rows, visual.counts):
        text[row] -= count
    return text


def _by_flops(parts: Parts, method: Method, budget: Budget, visual: Visual, text: list[int]) -> list[tuple[Stage, ...]]:
    """The budget holds for a sample as a whole; its images share the kept tokens in proportion to their size."""
    samples = visual.rows
    keep = [0] * len(samples)
    for sample in set(samples):
        images = [image for image, owner in enumerate(samples) if owner == sample]
        sizes = [visual.counts[image] for image in images]
        geometry = parts.geometry(sum(sizes), text[sample])
        total = method.kept(geometry.visual_tokens, budget, geometry)
        for image, share in zip(images, _apportion(total, sizes)):
            keep[image] = share
    return [method.plan(parts.geometry(n), k) for n, k in zip(visual.counts, keep)]


def _apportion(total: int, sizes: list[int]) -> list[int]:
    """Whole shares of `total` in proportion to `sizes`, by largest remainder, at least 1 each."""
    shares = [max(1, total * size // sum(sizes)) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % sum(sizes)), i))
    for i in by_remainder[: max(0, total - sum(shares))]:
        shares[i] += 1
    return shares


def text_tokens(visual: Visual, valid: Tensor) -> list[int]:
    """Per sample, valid tokens that are not visual ones (synchronises)."""
    seen = torch.zeros(len(valid), dtype=torch.long, device=valid.device)
    seen = seen.index_add(0, visual.sample, visual.visible.sum(1))
    return (valid.sum(1) - seen).tolist()


class Question:
    """Refuses samples whose last token is visual, for a method that reads the question.

    The device is asked when the call begins, and `check` reads the answer. On a GPU that waits for nothing but this
    question, so a `check` behind the launch of the encoder costs next to nothing.

    Args:
        placeholder, valid: `[B, L]` bool.
    """

    def __init__(self, method: Method, placeholder: Tensor, valid: Tensor):
        self.method = method
        ends_visual = (placeholder & valid).gather(1, last_valid(valid))[:, 0]
        self.answer, self.event = ends_visual.to("cpu", non_blocking=True), None
        if self.waits(placeholder):
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(placeholder.device))

    @staticmethod
    def waits(x: Tensor) -> bool:
        """Whether `check` is better called late. Not in a compiled graph, which an event would break."""
        return x.is_cuda and not torch.compiler.is_compiling()

    def check(self) -> None:
        """
        Raises:
            InputError: names the samples.
        """
        if self.event is not None:
            self.event.synchronize()
        if samples := [str(sample) for sample, visual in enumerate(self.answer.tolist()) if visual]:
            raise InputError(
                f"{self.method.name} reads the text after the image, and sample {', '.join(samples)} has none; put "
                "the question after the image, or use a method with needs_question=False (see list_methods)"
            )
