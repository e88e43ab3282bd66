"""Losses that stand out from the run's recent ones, by a score that no single outlier can move.

    z = (loss - median) / max(interquartile range / 1.349, 0.1 % of the median)      over the last 128 losses that were no outliers

The interquartile range over 1.349 is the standard deviation of a Gaussian; unlike the sample's it does not grow with the outlier it is
to judge, and from a list kept in order it costs two look-ups a step.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any

WINDOW, FEWEST = 128, 32  # steps remembered; steps before anything is judged
FLOOR = 1e-3  # of the median: a run whose loss has gone flat is not to be judged by rounding
IQR_TO_STD = 1 / 1.349  # Gaussian


class LossSpikes:
    """Whether a step's global loss is an outlier; one-sided, as a low loss harms nobody."""

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self.window: deque[float] = deque()
        self._ordered: list[float] = []
        self.z: float | None = None
        """Score of the last loss; None while too few are known."""

    def observe(self, loss: float) -> bool:
        """Judge a loss; only one that is no outlier is remembered."""
        self.z = None
        if not math.isfinite(loss):
            return False  # the step was not finite, which is another matter
        if self.threshold is not None and len(self.window) >= FEWEST:
            first, middle, third = (self._ordered[len(self._ordered) * quarter // 4] for quarter in (1, 2, 3))
            self.z = (loss - middle) / max((third - first) * IQR_TO_STD, FLOOR * abs(middle), 1e-12)
            if self.z > self.threshold:
                return True
        if len(self.window) == WINDOW:
            del self._ordered[bisect_left(self._ordered, self.window.popleft())]
        self.window.append(loss)
        insort(self._ordered, loss)
        return False

    def restart(self) -> None:
        """Forget: the run has been taken back, or what it trains on has changed."""
        self.window.clear()
        self._ordered.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"window": list(self.window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if never interrupted."""
        self.window = deque(state["window"])
        self._ordered = sorted(self.window)
