"""How the largest activation over the median of a layer moves over training: the five-parameter function and what follows from it.

    f(t) = A exp(-lambda x) log(x) + K,   x = gamma t + t0

(arXiv 2508.03616; natural logarithm; lambda, gamma and t0 above 0, so that x is, for every step t >= 0). For A > 0 it rises to one peak
and falls to K. The peak is where lambda x log(x) = 1: x* = exp(W(1 / lambda)) with Lambert's W, t* = (x* - t0) / gamma,
f(t*) = K + A exp(-lambda x*) W(1 / lambda). For A < 0 that point is the lowest.

The same function with beta = lambda gamma, tau0 = t0 / gamma, A1 = A exp(-lambda t0), A2 = A1 log(gamma) is

    f(t) = exp(-beta t) (A1 log(t + tau0) + A2) + K,

in which A, gamma and t0 no longer make up for one another: a fit moves in these (``dynamics_fit``), a person reads the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megastab.config.errors import UserError

Array = NDArray[np.float64]
SYMBOLS = ("A", "lambda", "gamma", "t0", "K")
_DOUBLINGS = 200  # of the step, in search of a crossing: beyond every run


class Dynamics(NamedTuple):
    """One curve. Steps are the run's own; the ratio has no unit."""

    amplitude: float
    """A."""
    decay: float
    """lambda > 0."""
    rate: float
    """gamma > 0, per step."""
    offset: float
    """t0 > 0; below 1 the curve starts under K (for A > 0)."""
    asymptote: float
    """K: where the ratio ends."""

    def at(self, steps: ArrayLike) -> Array:
        """f at ``steps`` >= 0, of their shape."""
        x = self._x(steps)
        return self.amplitude * np.exp(-self.decay * x) * np.log(x) + self.asymptote

    def jacobian(self, steps: Sequence[float] | Array) -> Array:
        """[len(steps), 5]: derivatives of f by A, lambda, gamma, t0, K."""
        x = self._x(steps)
        fall, log = np.exp(-self.decay * x), np.log(x)
        by_x = self.amplitude * fall * (1 / x - self.decay * log)
        by_decay = -self.amplitude * x * fall * log
        return np.stack([fall * log, by_decay, np.asarray(steps, np.float64) * by_x, by_x, np.ones_like(x)], axis=1)

    @property
    def has_peak(self) -> bool:
        """Whether the extremum is the highest point (A > 0)."""
        return self.amplitude > 0

    @property
    def peak_step(self) -> float:
        """t*, the step of the extremum; negative where the curve is past it from the start."""
        return math.exp(_w(self.decay) - math.log(self.rate)) - self.offset / self.rate

    @property
    def peak_height(self) -> float:
        """f(t*)."""
        log = _w(self.decay)  # of x*
        return self.asymptote + self.amplitude * math.exp(-self.decay * math.exp(log)) * log

    def is_observable(self, horizon: float = math.inf) -> bool:
        """Whether there is a peak after step 0 and not after ``horizon``."""
        return self.has_peak and 0 < self.peak_step <= horizon

    def peak_gradients(self) -> tuple[Array, Array]:
        """Derivatives of (``peak_step``, ``peak_height``) by A, lambda, gamma, t0, K, [5] each.

        From lambda x log(x) = 1 follows dx*/dlambda = -x log(x) / (lambda (log(x) + 1)); the height is stationary in x.
        """
        log = _w(self.decay)
        x = math.exp(log)
        by_decay = -x * log / (self.decay * (log + 1)) / self.rate
        fall = math.exp(-self.decay * x)
        step = np.array([0.0, by_decay, -self.peak_step / self.rate, -1 / self.rate, 0.0])
        return step, np.array([fall * log, -self.amplitude * x * fall * log, 0.0, 0.0, 1.0])

    def first_crossing(self, level: float, start: float = 0.0) -> float | None:
        """The first step >= ``start`` at which f is at least ``level``; None where it never is."""
        if self.at(start) >= level:
            return start
        turn = max(self.peak_step, start)
        if turn > start and self.at(turn) >= level:
            return self._rise_through(level, start, turn)
        if self.has_peak or self.asymptote <= level:
            return None  # from the turn on it falls, or rises to less
        far = max(turn, 1.0)
        for _ in range(_DOUBLINGS):
            if self.at(far) >= level:
                return self._rise_through(level, turn, far)
            far *= 2
        return None

    def in_identifiable_form(self) -> Identifiable:
        """The same curve as beta, tau0, A1, A2, K."""
        a1 = self.amplitude * math.exp(-self.decay * self.offset)
        return Identifiable(self.decay * self.rate, self.offset / self.rate, a1, a1 * math.log(self.rate), self.asymptote)

    def to_json(self) -> dict[str, float]:
        """By the paper's symbols."""
        return dict(zip(SYMBOLS, map(float, self), strict=True))

    def _x(self, steps: ArrayLike) -> Array:
        return self.rate * np.asarray(steps, np.float64) + self.offset

    def _rise_through(self, level: float, low: float, high: float) -> float:
        for _ in range(200):  # halvings: to the last bit
            middle = (low + high) / 2
            low, high = (low, middle) if self.at(middle) >= level else (middle, high)
        return high


class Identifiable(NamedTuple):
    """The same function, in the five numbers that data can tell apart."""

    beta: float
    """Per step, > 0."""
    tau0: float
    """Steps, > 0."""
    a1: float
    a2: float
    asymptote: float

    def at(self, steps: ArrayLike) -> Array:
        """f at ``steps`` >= 0, of their shape."""
        t = np.asarray(steps, np.float64)
        return np.exp(-self.beta * t) * (self.a1 * np.log(t + self.tau0) + self.a2) + self.asymptote

    def as_dynamics(self) -> Dynamics:
        """The paper's five.

        Raises:
            ValueError: A1 is 0 (then it is a plain exponential), or a number is beyond what a float holds.
        """
        try:
            rate = math.exp(self.a2 / self.a1)
            curve = Dynamics(self.a1 * math.exp(self.beta * self.tau0), self.beta / rate, rate, self.tau0 * rate, self.asymptote)
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"no A, lambda, gamma and t0 give {self}") from error
        if not all(map(math.isfinite, curve)) or min(curve.decay, curve.rate, curve.offset) <= 0:
            raise ValueError(f"no A, lambda, gamma and t0 give {self}")
        return curve


def peak_position(decay: float) -> float:
    """x* = exp(W(1 / lambda)), where lambda x log(x) = 1; ``decay`` > 0."""
    return math.exp(_w(decay))


def _w(decay: float) -> float:
    """W(1 / lambda), which is also log(x*)."""
    try:
        from scipy.special import lambertw
    except ImportError as error:
        raise missing("scipy", error) from error
    return float(lambertw(1 / decay).real)


def missing(package: str, error: ImportError) -> UserError:
    """What to tell a user whose installation lacks ``package``."""
    return UserError(f"this analysis needs {package}, which is not installed ({error}): pip install megastab[analysis]")
