"""The methods ZClip is compared with, behind the same interface: AutoClip, AdaGC and SkipStep, each as published.

Differs, for all three: a norm that is not finite skips the step and enters no statistic, a norm of zero is applied and (but for SkipStep)
enters none, factors are exactly threshold / norm without the customary 1e-6, and the state can be saved.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

from megastab.stability.clip_rule import SMALLEST_SCALE, ClipDecision, RuleWithState, demand


class AutoClip(RuleWithState):
    """Clip to a percentile of the history of norms, the current one included (Seetharaman et al., arXiv 2007.14469).

    At percentile 10 about nine steps in ten are clipped. ``window`` limits the history, and with it memory and checkpoints.
    Differs: ``window`` is ours; None is the published method, which never forgets the first steps of a run.
    """

    SETTINGS = ("percentile", "window")
    STATE = ("history",)

    def __init__(self, percentile: float = 10.0, window: int | None = None, max_nonfinite_in_a_row: int | None = 8):
        super().__init__(max_nonfinite_in_a_row)
        self.percentile, self.window = percentile, window
        demand(0.0 <= percentile <= 100.0, "percentile", self.settings, "from 0 to 100")
        demand(window is None or window >= 1, "window", self.settings, "at least 1, or None for the whole history")
        self.history: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []

    def observe(self, norm: float) -> ClipDecision:
        """Decide for the norm of a step."""
        norm = float(norm)
        if nothing := self.unusable(norm, percentile(self._sorted, self.percentile) if self._sorted else None):
            return nothing
        self.nonfinite_in_a_row = 0
        if len(self.history) == self.window:
            del self._sorted[bisect_left(self._sorted, self.history[0])]
        self.history.append(norm)
        insort(self._sorted, norm)
        return _clipped_to(percentile(self._sorted, self.percentile), norm, self)

    def _take(self, state: dict[str, Any]) -> dict[str, str]:
        changes = super()._take(state)
        self._sorted = sorted(self.history)
        return changes


class AdaGC(RuleWithState):
    """Clip one tensor's norm to its own average of clipped norms (arXiv 2502.11034); one object for each tensor.

    While warming up the factor comes from the global norm and the average is the smallest clipped norm seen; afterwards it may exceed
    its average by the factor ``lambda_rel`` only, so that the average rises by at most 0.1 % a step.
    """

    SETTINGS = ("lambda_abs", "lambda_rel", "beta", "warmup_steps")
    STATE = ("gamma", "num_seen")

    def __init__(
        self,
        lambda_abs: float = 1.0,  # these four are the paper's defaults
        lambda_rel: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        max_nonfinite_in_a_row: int | None = 8,
    ):
        super().__init__(max_nonfinite_in_a_row)
        self.lambda_abs, self.lambda_rel, self.beta, self.warmup_steps = lambda_abs, lambda_rel, beta, warmup_steps
        demand(lambda_abs > 0.0, "lambda_abs", self.settings, "above 0")
        demand(lambda_rel >= 1.0, "lambda_rel", self.settings, "at least 1")
        demand(0.0 < beta < 1.0, "beta", self.settings, "between 0 and 1")
        demand(warmup_steps >= 1, "warmup_steps", self.settings, "at least 1: the average starts there")
        self.gamma: float | None = None  # infinity until the first step
        self.num_seen = 0

    def observe(self, norm: float, global_norm: float | None = None) -> ClipDecision:
        """Decide for the norm of a tensor; ``global_norm`` is that of all tensors, by default there is only this one."""
        norm, whole = float(norm), float(norm if global_norm is None else global_norm)
        for each in (whole, norm):
            if nothing := self.unusable(each, None if self.gamma is None else self.lambda_rel * self.gamma):
                return nothing
        self.nonfinite_in_a_row = 0
        is_warm = self.gamma is not None and self.num_seen >= self.warmup_steps
        threshold = self.lambda_rel * self.gamma if is_warm and self.gamma is not None else norm * (self.lambda_abs / whole)
        decision = _clipped_to(threshold, norm, self)
        if decision.action != "skip":
            clipped = decision.scale * norm
            if self.gamma is None:
                self.gamma = clipped
            else:
                self.gamma = self.beta * self.gamma + (1 - self.beta) * clipped if is_warm else min(self.gamma, clipped)
            self.num_seen += 1
        return decision


class SkipStep(RuleWithState):
    """Skip a step whose norm or loss stands ``sigma_factor`` deviations above the last ``rolling_interval_length`` (OLMo-core).

    A rejected value stays in the window, as in OLMo-core: after three rejected norms of 10 a fourth is accepted.
    Differs: a loss that is not finite skips its own step only; with ``compat=True`` it enters the window, as where OLMo-core takes the
    window's mean without a mask, and that step and the next 128 are skipped. Arithmetic is fp64 (OLMo-core: fp32).
    """

    SETTINGS = ("rolling_interval_length", "sigma_factor", "compat")
    STATE = ("norms", "losses")

    def __init__(
        self,
        rolling_interval_length: int = 128,  # OLMo-core's defaults
        sigma_factor: float = 6.0,
        compat: bool = False,
        max_nonfinite_in_a_row: int | None = 8,
    ):
        super().__init__(max_nonfinite_in_a_row)
        self.rolling_interval_length, self.sigma_factor, self.compat = rolling_interval_length, sigma_factor, compat
        demand(rolling_interval_length >= 2, "rolling_interval_length", self.settings, "at least 2")
        demand(sigma_factor > 0.0, "sigma_factor", self.settings, "above 0")
        self.norms: deque[float] = deque(maxlen=rolling_interval_length)
        self.losses: deque[float] = deque(maxlen=rolling_interval_length)

    def observe(self, norm: float, loss: float | None = None) -> ClipDecision:
        """Decide for the norm of a step and, where it is known on every rank, its global loss."""
        norm, seen = float(norm), None if loss is None else float(loss)
        is_finite = norm >= 0.0 and norm * norm < math.inf
        is_loss_finite = seen is None or math.isfinite(seen)
        if not self.compat and not (is_finite and is_loss_finite):
            return self.refuse(norm, None, "the loss is not finite" if is_finite else "")
        # The current value counts towards the minimum (half the window), as in OLMo-core.
        is_active = len(self.norms) + 1 >= max(2, self.rolling_interval_length // 2)
        norm_z, loss_z = standard_score(norm, self.norms), None if seen is None else standard_score(seen, self.losses)
        self.norms.append(norm)
        if seen is not None:
            self.losses.append(seen)
        if not is_finite:
            return self.refuse(norm, None)
        self.nonfinite_in_a_row = 0
        if is_active:
            for what, z in (("norm", norm_z), ("loss", loss_z)):
                if z is not None and not z <= self.sigma_factor:
                    return ClipDecision(None, 0.0, norm_z, "skip", f"the {what} is {z:.3g} deviations above its window")
        return ClipDecision(None, 1.0, norm_z, "apply")


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of sorted values with linear interpolation, numpy's default."""
    place = percent / 100 * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def standard_score(value: float, window: Sequence[float] | deque[float]) -> float | None:
    """Deviations (unbiased) of a value from the mean of a window; None below two values."""
    if len(window) < 2:
        return None
    mean = sum(window) / len(window)
    std = math.sqrt(sum((x - mean) * (x - mean) for x in window) / (len(window) - 1))
    if std == 0.0:
        return 0.0 if value == mean else math.copysign(math.inf, value - mean)
    return (value - mean) / std


def _clipped_to(threshold: float, norm: float, rule: RuleWithState) -> ClipDecision:
    """Scale by exactly threshold / norm above the threshold: everyday business here, which needs no reason."""
    if norm <= threshold:
        return ClipDecision(threshold, 1.0, None, "apply")
    scale = threshold / norm
    if scale < SMALLEST_SCALE:
        return rule.refuse(norm, threshold, f"no factor takes a norm of {norm:g} to {threshold:g}")
    return ClipDecision(threshold, scale, None, "clip")
