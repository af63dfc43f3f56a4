"""Intervals for what was measured, and which differences between two runs are real: users drawn again and again.

The bootstrap of Efron (1979), by percentiles. Users are drawn, not samples: what one user took goes together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TIMES = 1000
LEVEL = 95  # percent
AT_A_TIME = 4_000_000  # numbers in memory

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class BootstrapMetrics:
    """What was measured of some users, as a function of how often each of them counts.

    statistic: float64 [draws, users], how often each user was drawn -> float64 [draws, figures], NaN where a figure
        does not exist.
    users: how many there are.
    samples: how many numbers a draw looks at.
    """

    names: list[str]
    statistic: Statistic
    users: int
    samples: int

    def values(self) -> np.ndarray:
        """float64 [figures]: each user counts once."""
        return self.statistic(np.ones((1, self.users)))[0]

    def resampled(self, times: int = TIMES, seed: int = 0) -> np.ndarray:
        """float64 [times, figures]: as many users, drawn with replacement; the same ones for as many users."""
        draw = np.random.default_rng(seed)
        each = max(1, AT_A_TIME // max(self.users, self.samples))
        found = []
        for start in range(0, times, each):
            size = min(each, times - start)
            drawn = draw.integers(self.users, size=(size, self.users)) + np.arange(size)[:, None] * self.users
            weights = np.bincount(drawn.ravel(), minlength=size * self.users).reshape(size, self.users)
            found.append(self.statistic(weights.astype(np.float64)))
        return np.concatenate(found)

    def intervals(self) -> np.ndarray:
        """float64 [2, figures]: the lower and the upper end of each figure's interval."""
        return percentiles(self.resampled())


def means(names: list[str], values: np.ndarray) -> BootstrapMetrics:
    """BootstrapMetrics that are means over users, of values float64 [users, figures]."""
    return BootstrapMetrics(names, lambda weights: weights @ values / len(values), len(values), values.size)


def differences(figures: BootstrapMetrics, other: BootstrapMetrics) -> list[tuple[float, float, float, bool]]:
    """For each figure (`figures` - `other`, lower end, upper end, whether it is real), paired: both on the same draws.

    Real is a difference whose interval does not hold 0.
    """
    value = figures.values() - other.values()
    low, high = percentiles(figures.resampled() - other.resampled())
    real = (low > 0) | (high < 0)
    return [*zip(value.tolist(), low.tolist(), high.tolist(), real.tolist(), strict=True)]


def percentiles(samples: np.ndarray) -> np.ndarray:
    """[times, figures] -> [2, figures], the ends of the middle LEVEL percent; NaN where all samples are."""
    ends = np.full((2, samples.shape[1]), np.nan)
    there = ~np.isnan(samples).all(axis=0)
    outside = (100 - LEVEL) / 2
    if there.any():
        ends[:, there] = np.nanpercentile(samples[:, there], (outside, 100 - outside), axis=0)
    return ends
