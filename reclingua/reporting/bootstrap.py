"""Bootstrap confidence intervals of metrics, and significance of paired differences between two runs.

Percentile bootstrap (Efron 1979) over users, not over samples: all samples of a user are resampled together, since
they are not independent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE = 95  # percent
SIGNIFICANCE_NOTE = (
    f"Differences whose {CONFIDENCE}% bootstrap interval excludes 0 are marked significant (*), "
    "not corrected for multiple comparisons."
)
CHUNK_SIZE = 4_000_000  # numbers in memory at a time

Statistic = Callable[[np.ndarray], np.ndarray]


class Difference(NamedTuple):
    """Paired difference of a metric with the bounds of its interval; significant if the interval excludes 0."""

    value: float
    low: float
    high: float
    is_significant: bool


@dataclass(frozen=True)
class BootstrapMetrics:
    """Metrics as a function of how often each user is drawn.

    statistic: float64 [draws, users], count of each user in each draw -> float64 [draws, metrics], NaN where a metric
        is undefined.
    num_samples: numbers that the statistic holds in memory for one draw.
    """

    names: list[str]
    statistic: Statistic
    num_users: int
    num_samples: int

    def values(self) -> np.ndarray:
        """Return the metrics of the users as they are, float64 [metrics]."""
        return self.statistic(np.ones((1, self.num_users)))[0]

    def resample(self, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
        """Return the metrics of users drawn with replacement, float64 [num_resamples, metrics].

        The draws depend on the seed and the number of users alone, so that two runs on the same users are paired.
        """
        counts = draw_counts(self.num_users, num_resamples, seed)
        chunk_size = max(1, CHUNK_SIZE // max(self.num_users, self.num_samples))
        starts = range(0, num_resamples, chunk_size)
        return np.concatenate([self.statistic(counts[i : i + chunk_size].astype(np.float64)) for i in starts])

    @cached_property
    def samples(self) -> np.ndarray:
        """The metrics of the resamples, float64 [NUM_RESAMPLES, metrics]."""
        return self.resample()

    def intervals(self) -> np.ndarray:
        """Return the lower and upper bounds of the metrics' intervals, float64 [2, metrics]."""
        return interval_bounds(self.samples)


@lru_cache(maxsize=1)
def draw_counts(num_users: int, num_resamples: int, seed: int) -> np.ndarray:
    """Draw users with replacement; return how often each occurs in each draw, uint8 [num_resamples, num_users].

    All metrics of a page share the draws, so the last ones are kept: 100 MB for 100,000 users.
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((num_resamples, num_users), np.uint8)  # more than 255 of one user is out of the question
    chunk_size = max(1, CHUNK_SIZE // num_users)
    for start in range(0, num_resamples, chunk_size):
        size = min(chunk_size, num_resamples - start)
        # One bincount for all draws of the chunk: draw i counts user u in bin i * num_users + u.
        bins = generator.integers(num_users, size=(size, num_users)) + np.arange(size)[:, None] * num_users
        drawn = np.bincount(bins.ravel(), minlength=size * num_users).reshape(size, num_users)
        counts[start : start + size] = drawn
    return counts


def mean_metrics(names: list[str], values: np.ndarray) -> BootstrapMetrics:
    """Return metrics that are means over users, of values float64 [users, metrics]."""
    return BootstrapMetrics(names, lambda counts: counts @ values / len(values), len(values), values.size)


def paired_differences(metrics: BootstrapMetrics, baseline: BootstrapMetrics) -> list[Difference]:
    """Return metrics - baseline for each metric, with intervals from the same draws of users."""
    values = metrics.values() - baseline.values()
    low, high = interval_bounds(metrics.samples - baseline.samples)
    is_significant = (low > 0) | (high < 0)
    rows = zip(values.tolist(), low.tolist(), high.tolist(), is_significant.tolist(), strict=True)
    return [Difference(*row) for row in rows]


def interval_bounds(samples: np.ndarray) -> np.ndarray:
    """Return the bounds of the middle CONFIDENCE percent, [resamples, metrics] -> [2, metrics].

    A metric that is NaN in every resample gets NaN; resamples in which it is undefined are left out otherwise.
    """
    bounds = np.full((2, samples.shape[1]), np.nan)
    is_defined = ~np.isnan(samples).all(axis=0)
    tail = (100 - CONFIDENCE) / 2
    if is_defined.any():
        bounds[:, is_defined] = np.nanpercentile(samples[:, is_defined], (tail, 100 - tail), axis=0)
    return bounds
