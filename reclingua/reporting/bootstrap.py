"""Bootstrap confidence intervals of metrics, and significance of paired differences between two runs.

Percentile bootstrap (Efron 1979) over users, not over samples: all samples of a user are resampled together, since
they are not independent.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
        generator = np.random.default_rng(seed)
        chunk_size = max(1, CHUNK_SIZE // max(self.num_users, self.num_samples))
        chunks = []
        for start in range(0, num_resamples, chunk_size):
            size = min(chunk_size, num_resamples - start)
            # One bincount for all draws of the chunk: draw i counts user u in bin i * num_users + u.
            offsets = np.arange(size)[:, None] * self.num_users
            bins = generator.integers(self.num_users, size=(size, self.num_users)) + offsets
            counts = np.bincount(bins.ravel(), minlength=size * self.num_users).reshape(size, self.num_users)
            chunks.append(self.statistic(counts.astype(np.float64)))
        return np.concatenate(chunks)

    def intervals(self) -> np.ndarray:
        """Return the lower and upper bounds of the metrics' intervals, float64 [2, metrics]."""
        return interval_bounds(self.resample())


def mean_metrics(names: list[str], values: np.ndarray) -> BootstrapMetrics:
    """Return metrics that are means over users, of values float64 [users, metrics]."""
    return BootstrapMetrics(names, lambda counts: counts @ values / len(values), len(values), values.size)


def paired_differences(metrics: BootstrapMetrics, baseline: BootstrapMetrics) -> list[Difference]:
    """Return metrics - baseline for each metric, with intervals from the same draws of users."""
    values = metrics.values() - baseline.values()
    low, high = interval_bounds(metrics.resample() - baseline.resample())
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
