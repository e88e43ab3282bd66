"""The OLMo 2 spike score (arXiv 2501.00656): how often a series jumps far above its own recent past, in percent.

A value is a spike when it lies at least ``sigmas`` standard deviations above the mean of the ``window`` values before it. Only values
with a whole window before them are judged.

Differs: a value that is not finite is a spike and enters no window (the published score says nothing of it).
Differs: a series shorter than two windows is judged with half of it as the window, at least 100 values (``fitted_window``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_PREVIOUS = 100  # fewer values say too little about their deviation for seven of them to mean anything
CHUNK = 1024  # values judged at once: 8 MB of windows


def fitted_window(num_values: int, window: int = 1000) -> int:
    """The window a series of so many finite values is judged with: ``window``, or less where the series is short."""
    return min(window, max(MIN_PREVIOUS, num_values // 2))


def spike_score(values: Sequence[float], window: int = 1000, sigmas: float = 7.0) -> float:
    """Percentage of the judged values that are spikes; NaN when no value has a window before it.

    Raises:
        ValueError: ``window`` is below 2.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2; it is {window}")
    series = np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(series)
    finite = series[is_finite]
    window = fitted_window(len(finite), window)
    lost = int(np.count_nonzero(~is_finite & (np.cumsum(is_finite) >= window)))
    judged = max(0, len(finite) - window) + lost
    return 100.0 * (_num_spikes(finite, window, sigmas) + lost) / judged if judged else math.nan


def _num_spikes(finite: NDArray[np.float64], window: int, sigmas: float) -> int:
    count = 0
    for start in range(window, len(finite), CHUNK):
        now = finite[start : start + CHUNK]
        before = np.lib.stride_tricks.sliding_window_view(finite[start - window : start + len(now) - 1], window)
        mean, std = before.mean(axis=1), before.std(axis=1)
        count += int(np.count_nonzero((now > mean) & (now - mean >= sigmas * std)))  # a constant series has no spikes
    return count
