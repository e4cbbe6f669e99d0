"""Turn a budget into counts: which stage keeps how many tokens of every image of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune.adapters.structure import Parts
from prune.adapters.visual import Visual
from prune.budget import Budget
from prune.errors import InputError
from prune.method import Method, Reducer, Site, Stage, alive


@dataclass
class Cut:
    """One stage for all images of a call: `keep[s]` tokens of image s are left."""

    site: Site
    reducer: Reducer
    keep: list[int]


def plan(parts: Parts, method: Method, budget: Budget | None, visual: Visual, valid: Tensor) -> list[Cut]:
    """The cuts that remove something, in order.

    Args:
        valid: `[B, L]` bool; a `flops` budget counts the text tokens in it (synchronises).

    Raises:
        BudgetError: the budget is out of reach.
    """
    counts = visual.counts
    if budget is not None and budget.flops is not None:
        stages = _by_flops(parts, method, budget, visual, valid)
    else:
        by_count = {n: method.stages(parts.geometry(n), budget) for n in set(counts)}
        stages = [by_count[n] for n in counts]
    cuts, before = [], counts
    for number, stage in enumerate(stages[0]):
        keep = [min(per_image[number].keep, n) for per_image, n in zip(stages, before)]
        if keep != before:
            cuts.append(Cut(stage.site, stage.reducer, keep))
        before = keep
    return cuts


def _by_flops(parts: Parts, method: Method, budget: Budget, visual: Visual, valid: Tensor) -> list[tuple[Stage, ...]]:
    """Every image of a sample is cut by the same share, so that the sample as a whole meets the budget."""
    samples, lengths = visual.sample.tolist(), valid.sum(1).tolist()
    totals = {b: sum(n for n, s in zip(visual.counts, samples) if s == b) for b in set(samples)}
    shares = {}
    for sample, total in totals.items():
        geometry = parts.geometry(total, lengths[sample] - total)
        shares[sample] = budget.solve(geometry, lambda k, g=geometry: alive(g, method.plan(g, k))) / total
    return [
        method.plan(parts.geometry(n), min(n, max(1, round(n * shares[sample]))))
        for n, sample in zip(visual.counts, samples)
    ]


def check_question(method: Method, placeholder: Tensor, valid: Tensor) -> None:
    """Refuse a sample whose last token is visual, if the method reads the question (synchronises).

    Raises:
        InputError: names the samples.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, 0).amax(1, keepdim=True)
    ends_visual = (placeholder & valid).gather(1, last)[:, 0]
    if bool(ends_visual.any()):
        samples = ends_visual.nonzero()[:, 0].tolist()
        raise InputError(
            f"{method.name} reads the text after the image, and sample {', '.join(map(str, samples))} has none; "
            "put the question after the image, or use a method with needs_question=False (see list_methods)"
        )
