"""Intervals that know which samples belong together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; prints as "0.123 [0.110, 0.137]"."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def clustered(
    values: Sequence[float], clusters: Sequence, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of values (n,), paired differences too, and its bootstrap interval (scipy's percentile
    method), whole clusters drawn: a photographer's flowers resemble each other."""
    values = np.asarray(values, dtype=float)
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters do not go together")
    _, index = np.unique(np.asarray(list(clusters)), return_inverse=True)
    counts = np.bincount(index).astype(float)
    sums = np.bincount(index, weights=values)
    mean = float(values.mean())
    if len(counts) < 2:
        return Interval(mean, float("nan"), float("nan"))

    def ratio(s: np.ndarray, n: np.ndarray, axis: int = -1) -> np.ndarray:
        return s.sum(axis) / n.sum(axis)

    found = stats.bootstrap(
        (sums, counts),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
