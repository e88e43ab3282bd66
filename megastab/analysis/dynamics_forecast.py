"""What the first part of a run says of the rest, and how far off it was where the rest is there (early warning, arXiv 2508.03616)."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from megastab.analysis.dynamics_fit import Fit, FitFailed, fit
from megastab.analysis.dynamics_series import Series
from megastab.telemetry.moments import MASSIVE_RATIO

LAST_POINTS = 5  # their median is what "it stays as it is" means


@dataclass(frozen=True)
class Outcome:
    """What came, and what had been said: of the points after the first part."""

    num_points: int
    highest: float
    """Of the whole series."""
    highest_step: int
    end: float
    """Mean of the last tenth of these points."""
    told_end: float
    """The curve's, at the same steps."""
    error: float
    """Median of |told - came| / came."""
    error_of_staying: float
    """The same of the guess that the ratio stays where the first part left it: what a curve has to beat."""


@dataclass(frozen=True)
class Forecast:
    """Of one layer."""

    until: float
    """The last step the first part may hold."""
    fit: Fit | None
    failure: str
    """Why there is no fit."""
    crossing: float | None
    """The step at which the curve reaches ``MASSIVE_RATIO``; None: it never does."""
    outcome: Outcome | None
    """None where the run has not gone further, or there is no fit."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        outcome = vars(self.outcome) if self.outcome else None
        told = {"fit": self.fit.to_json() if self.fit else None, "failure": self.failure or None}
        return {"until_step": self.until, **told, "crosses_1000_at": self.crossing, "outcome": outcome}


def forecast(series: Series, until: float) -> Forecast:
    """Fit the steps up to ``until`` and compare with those behind."""
    early = series.between(0, until)
    try:
        found = fit(early.steps, early.ratios)
    except FitFailed as reason:
        return Forecast(until, None, str(reason), None, None)
    rest = [(step, ratio) for step, ratio in zip(series.steps, series.ratios, strict=True) if step > until]
    outcome = _outcome(series, early, rest, found) if rest else None
    return Forecast(until, found, "", found.curve.first_crossing(MASSIVE_RATIO, found.first_step), outcome)


def _outcome(series: Series, early: Series, rest: list[tuple[int, float]], found: Fit) -> Outcome:
    told = found.curve.at([step for step, _ in rest]).tolist()
    came = [ratio for _, ratio in rest]
    stays = median(early.ratios[-LAST_POINTS:])
    tail = max(1, len(rest) // 10)
    highest = max(series.ratios)
    errors = [abs(a - b) / b for a, b in zip(told, came, strict=True)]
    staying = [abs(stays - b) / b for b in came]
    where = series.steps[series.ratios.index(highest)]
    return Outcome(len(rest), highest, where, fmean(came[-tail:]), fmean(told[-tail:]), median(errors), median(staying))


def seen_crossing(series: Series) -> int | None:
    """The first sampled step at which the ratio was at least ``MASSIVE_RATIO``."""
    return next((step for step, ratio in zip(series.steps, series.ratios, strict=True) if ratio >= MASSIVE_RATIO), None)
