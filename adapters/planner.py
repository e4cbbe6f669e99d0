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
        ConfigError: the method acts at a site it did not name when it was attached.
    """
    counts = visual.counts
    if budget is not None and budget.flops is not None:
        stages = _by_flops(parts, method, budget, visual, valid)
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


def _by_flops(parts: Parts, method: Method, budget: Budget, visual: Visual, valid: Tensor) -> list[tuple[Stage, ...]]:
    """The budget holds for a sample as a whole; its images share the kept tokens in proportion to their size."""
    samples, text = visual.sample.tolist(), text_tokens(visual, valid)
    keep = [0] * len(samples)
    for sample in set(samples):
        images = [image for image, owner in enumerate(samples) if owner == sample]
        sizes = [visual.counts[image] for image in images]
        geometry = parts.geometry(sum(sizes), text[sample])
        total = budget.solve(geometry, lambda k, g=geometry: alive(g, method.plan(g, k)))
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


def check_question(method: Method, placeholder: Tensor, valid: Tensor) -> None:
    """Refuse a sample whose last token is visual, if the method reads the question (synchronises).

    Raises:
        InputError: names the samples.
    """
    ends_visual = (placeholder & valid).gather(1, last_valid(valid))[:, 0]
    if bool(ends_visual.any()):
        samples = ends_visual.nonzero()[:, 0].tolist()
        raise InputError(
            f"{method.name} reads the text after the image, and sample {', '.join(map(str, samples))} has none; "
            "put the question after the image, or use a method with needs_question=False (see list_methods)"
        )
