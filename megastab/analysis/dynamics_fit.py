"""The five-parameter function of ``hidden_dynamics`` fitted to one layer's ratios, and how far the result is to be trusted.

Weighted least squares (scipy's trust region, with the analytic Jacobian) in log beta, log tau0, A1, log gamma and K, on steps and ratios
brought to [0, 1]. For given beta and tau0 the rest is linear, so that starts cost nothing: a grid of them is solved, every valley of it is
gone down, and the lowest wins. K stays at or above 1, which is the least a largest over a median can be.

Early points weigh more, where the curve turns fastest and evenly sampled runs have fewest: ``1 / (EARLY + t / T)``.

Differs: arXiv 2508.03616 fits A, lambda, gamma, t0 and K from one start with equal weights and lets K be anything. There A, gamma and t0
make up for one another, an early peak counts as little as it has points, and a fit on a rise falls below 0 beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megastab.analysis.hidden_dynamics import Array, Dynamics, Identifiable, missing

FLOOR = 1.0
MIN_POINTS = 8  # five parameters, and something left to tell whether they describe anything
EARLY = 0.1  # a point at the start weighs 11 times one at the end
GRID = (16, 8)  # values of beta and of tau0 that are tried
FEW, MANY, FINISHED = 25, 600, 6
CONSTANT = 1e-9  # of the largest ratio: a spread below that is rounding
NAMES = ("beta", "tau0", "A1", "gamma", "K")
# In units of the series' length and spread. A tau0 above the length would make log(t + tau0) a straight line, of which any A, gamma and t0
# are made alike (measured: it wins 0.003 of R2 and gives an A of 1e38); what is faster than the gap between samples none could see.
_SLOWEST, _LATEST, _SHORTEST = 1e-3, 1.0, 0.1
_RATE, _HEIGHT, _ASYMPTOTE = 7.0, 1e6, 10.0  # |log gamma|, |A1|, |K| from the lowest ratio
EXACT = 1e-3  # of the spread: nearer than that an unfinished descent is good enough, and no measured series is as smooth
_AT_BOUND = 1e-3  # of a bound's distance to the other

Errors = tuple[float, float]
"""Of the peak's step and height."""


class FitFailed(Exception):
    """Why there is no curve."""


@dataclass(frozen=True)
class Fit:
    """A curve and how it describes its series."""

    curve: Dynamics
    r2: float
    """1 - squares of residuals over squares around the mean, every point alike; may be negative."""
    num_points: int
    first_step: int
    last_step: int
    at_bound: tuple[str, ...]
    """Which of ``NAMES`` ended at the end of what was allowed: the series does not determine them."""
    peak_step_error: float
    """Standard error, from residuals taken as independent (samples close to each other are not: it is a lower bound); infinite where the
    series does not determine it."""
    peak_height_error: float
    """The same of the height."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite errors as None."""
        errors = {"peak_step_error": self.peak_step_error, "peak_ratio_error": self.peak_height_error}
        facts = {"r2": self.r2, "points": self.num_points, "first_step": self.first_step, "last_step": self.last_step}
        peak = {"peak_step": self.curve.peak_step, "peak_ratio": self.curve.peak_height, "has_peak": self.curve.has_peak}
        plain = {name: value if math.isfinite(value) else None for name, value in errors.items()}
        return {**self.curve.to_json(), **peak, **plain, **facts, "at_bound": list(self.at_bound)}


def fit(steps: ArrayLike, ratios: ArrayLike, *, early: float = EARLY, floor: float = FLOOR) -> Fit:
    """Fit one layer's series, in any order of steps.

    Args:
        steps: [N], at least 0, no step twice.
        ratios: [N], finite.
        early: how much early points weigh; infinity: all alike.
        floor: the least K may be, unless a ratio is below it.

    Raises:
        FitFailed: too few points, a series that does not move, or no start that converged.
        ValueError: not such a series.
    """
    t, r = _series(steps, ratios)
    length, low, spread = float(t[-1]), float(r.min()), float(r.max() - r.min())
    u, v = t / length, (r - low) / spread
    weights = np.ones_like(u) if math.isinf(early) else 1 / (early + u)
    weights /= weights.mean()
    bounds = _bounds(u, min(0.0, (floor - low) / spread))
    found = next(((theta, c) for theta in _descents(u, v, weights, bounds) if (c := _curve(theta, length, low, spread))), None)
    if found is None:
        raise FitFailed("the least squares did not converge from any start")
    theta, curve = found
    residual = r - curve.at(t)
    free = np.minimum(theta - bounds[0], bounds[1] - theta) > _AT_BOUND * (bounds[1] - bounds[0])
    at_bound = tuple(name for name, is_free in zip(NAMES, free, strict=True) if not is_free)
    errors = (math.inf, math.inf)
    if set(at_bound) <= {"tau0", "K"}:  # a straight rise, a fall to the floor; anything else at its bound decides where the peak is
        errors = _peak_errors(curve, theta, free, spread, u, residual, weights)
    r2 = 1 - float(np.sum(residual**2) / np.sum((r - r.mean()) ** 2))
    return Fit(curve, r2, len(t), int(t[0]), int(t[-1]), at_bound, *errors)


def _series(steps: ArrayLike, ratios: ArrayLike) -> tuple[Array, Array]:
    t, r = np.asarray(steps, np.float64), np.asarray(ratios, np.float64)
    if t.shape != r.shape or t.ndim != 1 or not (np.isfinite(t).all() and np.isfinite(r).all()):
        raise ValueError("steps and ratios are two columns of finite numbers")
    order = np.argsort(t)
    t, r = t[order], r[order]
    if len(t) and (t[0] < 0 or (np.diff(t) == 0).any()):
        raise ValueError("a step is at least 0 and there once")
    if len(t) < MIN_POINTS:
        raise FitFailed(f"{len(t)} points: five parameters need at least {MIN_POINTS}")
    if r.max() - r.min() <= CONSTANT * abs(r).max():
        raise FitFailed(f"the ratio does not move from {r[0]:.6g}: there is nothing to fit")
    return t, r


def _bounds(u: Array, floor: float) -> tuple[Array, Array]:
    """(lowest, highest) of log beta, log tau0, A1, log gamma, K."""
    shortest = _SHORTEST * float(np.diff(u).min())
    low = [math.log(_SLOWEST), math.log(shortest), -_HEIGHT, -_RATE, max(floor, -_ASYMPTOTE)]
    high = [math.log(1 / shortest), math.log(_LATEST), _HEIGHT, _RATE, _ASYMPTOTE]
    return np.array(low), np.array(high)


def _starts(u: Array, v: Array, weights: Array, bounds: tuple[Array, Array]) -> list[Array]:
    """A grid of beta and tau0, the rest solved for: at each tau0 every beta that is better than its neighbours.

    The best of the whole grid would all lie in one valley.
    """
    inside = 1e-6 * (bounds[1] - bounds[0])  # the trust region needs room

    def solved(log_beta: float, log_tau0: float) -> tuple[float, Array]:
        theta = np.clip(_linear(u, v, weights, log_beta, log_tau0), bounds[0] + inside, bounds[1] - inside)
        return float(np.sum(weights * (_value(theta, u) - v) ** 2)), theta

    betas, taus = (np.linspace(bounds[0][i], bounds[1][i], count + 2)[1:-1].tolist() for i, count in enumerate(GRID))
    found = []
    for tau0 in taus:
        row = [solved(beta, tau0) for beta in betas]
        padded = [math.inf, *(score for score, _ in row), math.inf]
        found += [theta for i, (score, theta) in enumerate(row) if padded[i] > score <= padded[i + 2]]
    return found


def _linear(u: Array, v: Array, weights: Array, log_beta: float, log_tau0: float) -> Array:
    """A1, A2 and K for a given beta and tau0; where A1 is next to nothing gamma ends at its bound, and A1 and K are solved for again."""
    fall, log = np.exp(-math.exp(log_beta) * u), np.log(u + math.exp(log_tau0))
    root = np.sqrt(weights)
    columns = np.stack([fall * log, fall, np.ones_like(u)], axis=1)
    a1, a2, asymptote = np.linalg.lstsq(columns * root[:, None], v * root, rcond=None)[0]
    log_rate = math.copysign(_RATE, a1 * a2) if abs(a2) > _RATE * abs(a1) else a2 / a1 if a1 else 0.0
    if abs(log_rate) == _RATE:
        columns = np.stack([fall * (log + log_rate), np.ones_like(u)], axis=1)
        a1, asymptote = np.linalg.lstsq(columns * root[:, None], v * root, rcond=None)[0]
    return np.array([log_beta, log_tau0, a1, log_rate, asymptote])


def _value(theta: Array, u: Array) -> Array:
    log_beta, log_tau0, a1, log_rate, asymptote = theta
    return a1 * np.exp(-np.exp(log_beta) * u) * (np.log(u + np.exp(log_tau0)) + log_rate) + asymptote


def _derivatives(theta: Array, u: Array) -> Array:
    """[N, 5]: of ``_value`` by theta."""
    log_beta, log_tau0, a1, log_rate, _ = theta
    beta, tau0 = np.exp(log_beta), np.exp(log_tau0)
    fall, log = np.exp(-beta * u), np.log(u + tau0) + log_rate
    return np.stack([-beta * u * a1 * fall * log, a1 * fall * tau0 / (u + tau0), fall * log, a1 * fall, np.ones_like(u)], axis=1)


def _descents(u: Array, v: Array, weights: Array, bounds: tuple[Array, Array]) -> list[Array]:
    """What converged, the lowest first: a few steps from every start, and all the way from the ``FINISHED`` lowest of these."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise missing("scipy", error) from error
    root = np.sqrt(weights)

    def residuals(theta: Array) -> Array:
        return root * (_value(theta, u) - v)

    def slopes(theta: Array) -> Array:
        return root[:, None] * _derivatives(theta, u)

    def descend(start: Array, evaluations: int) -> Any:
        return least_squares(residuals, start, slopes, bounds=bounds, method="trf", x_scale="jac", max_nfev=evaluations)

    begun = sorted((descend(start, FEW) for start in _starts(u, v, weights, bounds)), key=lambda found: float(found.cost))
    ended = [found if found.status > 0 else descend(found.x, MANY) for found in begun[:FINISHED]]
    good = [found for found in ended if found.status > 0 or 2 * found.cost < EXACT**2 * len(u)]
    return [found.x for found in sorted(good, key=lambda found: float(found.cost))]


def _curve(theta: Array, length: float, low: float, spread: float) -> Dynamics | None:
    """In the run's own steps and ratios; None where A is beyond what a float holds."""
    log_beta, log_tau0, a1, log_rate, asymptote = map(float, theta)
    # log(t + tau0) + log gamma is the same number in either unit of time: only beta, tau0 and gamma change, A1 does not
    beta, tau0, height = math.exp(log_beta) / length, math.exp(log_tau0) * length, a1 * spread
    a2 = height * (log_rate - math.log(length))
    try:
        return Identifiable(beta, tau0, height, a2, low + asymptote * spread).as_dynamics()
    except ValueError:
        return None


def _peak_errors(
    curve: Dynamics, theta: Array, free: NDArray[np.bool_], spread: float, u: Array, residual: Array, weights: Array
) -> Errors:
    """Standard errors of the peak's step and height: sigma^2 (J' W J)^-1 J' W^2 J (J' W J)^-1 along their gradients.

    The weights say what matters, not what is exact: every point has the same variance sigma^2. ``free``: what is not held at a bound.
    """
    slopes = spread * _derivatives(theta, u)[:, free]
    scale = np.sqrt((slopes**2).sum(axis=0))
    weighted = slopes / scale * np.sqrt(weights)[:, None]
    singular = np.linalg.svd(weighted, compute_uv=False)
    if singular[-1] <= 1e-10 * singular[0]:
        return math.inf, math.inf
    by_point = np.linalg.pinv(weighted, rcond=1e-12) * np.sqrt(weights) / scale[:, None]  # [free, N]: what moving a point does to theta
    by_theta = _chain(curve, theta, spread)[:, free]
    std = math.sqrt(float(np.sum(residual**2)) / (len(u) - len(scale)))
    step, height = (std * float(np.linalg.norm(gradient @ by_theta @ by_point)) for gradient in curve.peak_gradients())
    return step, height


def _chain(curve: Dynamics, theta: Array, spread: float) -> Array:
    """[5, 5]: derivatives of A, lambda, gamma, t0, K by theta."""
    amplitude, decay, rate, offset, _ = curve
    growth = amplitude * decay * offset  # A = A1 exp(beta tau0), and beta tau0 = lambda t0
    by_log_beta, by_log_tau0 = [growth, decay, 0, 0, 0], [growth, 0, 0, offset, 0]
    by_a1, by_log_rate = [amplitude / theta[2], 0, 0, 0, 0], [0, -decay, rate, offset, 0]
    return np.array([by_log_beta, by_log_tau0, by_a1, by_log_rate, [0, 0, 0, 0, spread]], np.float64).T
