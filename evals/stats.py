"""Intervals for means of per-item scores, by bootstrap over items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean with its 95 % percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(scores: Sequence[float]) -> Estimate:
    """The mean of per-item scores and its bootstrap interval (2,000 resamples, fixed seed; NaN for no items)."""
    from scipy.stats import bootstrap

    values = np.asarray(scores, dtype=float)
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"))
    mean = float(values.mean())
    if values.min() == values.max():  # nothing varies: scipy would warn
        return Estimate(mean, mean, mean)
    batch = max(1, 10**7 // len(values))  # resamples held at a time
    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=batch, confidence_level=LEVEL, method="percentile", rng=0
    )
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def paired_difference(scores: Sequence[float], reference: Sequence[float]) -> Estimate:
    """How much better than `reference` on the SAME items: resampling items keeps the pairs together.

    Raises:
        ValueError: not the same number of items.
    """
    if len(scores) != len(reference):
        raise ValueError(f"paired scores need the same items, got {len(scores)} and {len(reference)}")
    return mean_interval(np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float))
