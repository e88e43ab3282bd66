"""Mean and variance of gradient norms: from a sample, and as exponential averages. Plain floats, no state."""

from __future__ import annotations

from collections.abc import Sequence

MAD_TO_STD = 1.4826  # standard deviation of a Gaussian over its median absolute deviation, 1 / Phi^-1(3/4)


def median(values: Sequence[float]) -> float:
    """The middle of the sorted values; the mean of the middle two when their number is even."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def plain_sample(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance (over N, as the released zclip 1.0.0)."""
    mean = sum(values) / len(values)
    return mean, sum((x - mean) ** 2 for x in values) / len(values)


def robust_sample(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the variance a Gaussian of that median absolute deviation has: a few huge values change neither."""
    centre = median(values)
    std = MAD_TO_STD * median([abs(x - centre) for x in values])
    return centre, std * std


def updated(mean: float, var: float, x: float, alpha: float) -> tuple[float, float]:
    """The paper's averages: the new mean first, then the variance around it (a stationary sigma comes out 2.3 % low)."""
    mean = alpha * mean + (1 - alpha) * x
    return mean, alpha * var + (1 - alpha) * (x - mean) ** 2


def updated_west(mean: float, var: float, x: float, alpha: float) -> tuple[float, float]:
    """The exact exponentially weighted variance (West, 1979): alpha (var + (1 - alpha) (x - old mean)^2)."""
    delta = x - mean
    return mean + (1 - alpha) * delta, alpha * (var + (1 - alpha) * delta * delta)
