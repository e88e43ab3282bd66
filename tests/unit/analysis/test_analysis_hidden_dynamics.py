"""The five-parameter curve of arXiv 2508.03616: its numbers, what follows from it, and fits that find it again."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megastab.analysis.dynamics_fit import FitFailed, fit
from megastab.analysis.hidden_dynamics import Dynamics, Identifiable, peak_position
from megastab.config.errors import UserError

GOLDEN = Dynamics(amplitude=100.0, decay=0.5, rate=0.1, offset=1.0, asymptote=10.0)
LATE = Dynamics(amplitude=2000.0, decay=0.3, rate=0.002, offset=0.3, asymptote=50.0)
FALLING = Dynamics(amplitude=100.0, decay=0.5, rate=0.1, offset=4.0, asymptote=10.0)
DIPPING = Dynamics(amplitude=-60.0, decay=0.5, rate=0.1, offset=1.2, asymptote=80.0)
CURVES = [GOLDEN, LATE, FALLING, DIPPING]


def steps_of(curve: Dynamics, count: int = 80) -> np.ndarray:
    """From 0 to where the curve has come down again."""
    return np.linspace(0, 6 / curve.rate / curve.decay, count)


# -- the curve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "position"), [(0.1, 5.72892557), (0.5, 2.34575075), (1.0, 1.76322283), (2.0, 1.42152994)])
def test_the_peak_is_where_lambert_says(decay: float, position: float) -> None:
    assert peak_position(decay) == pytest.approx(position, abs=5e-9), "to the digits printed"
    x = peak_position(decay)
    assert decay * x * math.log(x) == pytest.approx(1.0, rel=1e-12)


def test_the_golden_curve() -> None:
    told = [10.0, 29.152816, 36.386077, 18.920645, 10.008384]
    np.testing.assert_allclose(GOLDEN.at([0, 5, GOLDEN.peak_step, 50, 200]), told, atol=5e-7, rtol=0)  # to the digits printed
    assert GOLDEN.peak_step == pytest.approx(13.457508, abs=5e-7) and GOLDEN.peak_height == pytest.approx(36.386077, abs=5e-7)
    other = GOLDEN.in_identifiable_form()
    assert other.beta == pytest.approx(0.05) and other.tau0 == pytest.approx(10.0) and other.asymptote == 10.0
    assert other.a1 == pytest.approx(60.653066, abs=5e-7) and other.a2 == pytest.approx(-139.658846, abs=5e-7)
    assert other.at(5) == pytest.approx(29.152816, abs=5e-7)


@pytest.mark.parametrize("curve", CURVES)
def test_both_forms_are_one_function(curve: Dynamics) -> None:
    steps = steps_of(curve)
    np.testing.assert_allclose(curve.in_identifiable_form().at(steps), curve.at(steps), rtol=1e-10)
    np.testing.assert_allclose(curve.in_identifiable_form().as_dynamics(), curve, rtol=1e-10)


@pytest.mark.parametrize("form", [Identifiable(0.1, 5.0, 0.0, 3.0, 1.0), Identifiable(0.1, 5.0, 1e-3, 3.0, 1.0)])
def test_a_plain_exponential_has_no_five_parameters(form: Identifiable) -> None:
    with pytest.raises(ValueError, match="no A, lambda, gamma and t0"):
        form.as_dynamics()  # no logarithm in it, or a gamma of exp(3000)


@pytest.mark.parametrize("curve", CURVES)
def test_derivatives_are_slopes(curve: Dynamics) -> None:
    steps, jacobian = steps_of(curve)[1:], curve.jacobian(steps_of(curve)[1:])
    by_step, by_height = curve.peak_gradients()
    for i, value in enumerate(curve):
        small = 1e-6 * value
        up, down = (curve._replace(**{curve._fields[i]: value + change}) for change in (small, -small))
        slope = (up.at(steps) - down.at(steps)) / (2 * small)
        # central differences are off by the third derivative times 1e-12 and by fp64's rounding over 1e-6
        np.testing.assert_allclose(jacobian[:, i], slope, rtol=1e-6, atol=1e-8 * abs(slope).max())
        slopes = [(up.peak_step - down.peak_step) / (2 * small), (up.peak_height - down.peak_height) / (2 * small)]
        np.testing.assert_allclose([by_step[i], by_height[i]], slopes, rtol=1e-5, atol=1e-7)


def test_a_peak_is_observable_after_the_start_and_within_the_run() -> None:
    assert GOLDEN.is_observable() and GOLDEN.is_observable(13.5) and not GOLDEN.is_observable(13.4)
    assert FALLING.peak_step < 0 and not FALLING.is_observable()
    assert not DIPPING.has_peak and not DIPPING.is_observable()
    assert DIPPING.at(DIPPING.peak_step) == pytest.approx(min(DIPPING.at(np.linspace(0, 100, 10001))), rel=1e-6), "the lowest point"


def test_the_first_crossing() -> None:
    at = GOLDEN.first_crossing(30.0)
    assert at is not None and 5 < at < GOLDEN.peak_step and GOLDEN.at(at) == pytest.approx(30.0, rel=1e-12)
    assert GOLDEN.first_crossing(40.0) is None, "above the peak"
    assert GOLDEN.first_crossing(10.0) == 0.0 and GOLDEN.first_crossing(30.0, start=12.0) == 12.0, "it is there already"
    assert GOLDEN.first_crossing(30.0, start=30.0) is None, "it has come down"
    assert FALLING.first_crossing(35.0) is None
    at = DIPPING.first_crossing(79.0)
    assert at is not None and at > DIPPING.peak_step and DIPPING.at(at) == pytest.approx(79.0, rel=1e-12), "after the dip"
    assert DIPPING.first_crossing(80.5) is None, "above what it tends to"


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
def test_without_noise_the_curve_is_found(curve: Dynamics) -> None:
    steps = steps_of(curve)
    found = fit(steps, curve.at(steps))
    # a descent that is not finished counts where it is within 1e-3 of the spread (EXACT); these end far below
    np.testing.assert_allclose(found.curve.at(steps), curve.at(steps), atol=1e-3 * np.ptp(curve.at(steps)))
    assert found.r2 > 1 - 1e-5 and found.num_points == 80 and (found.first_step, found.last_step) == (0, int(steps[-1]))


@pytest.mark.parametrize("curve", [GOLDEN, LATE])
def test_noise_moves_the_peak_as_far_as_told(curve: Dynamics) -> None:
    """The parameters themselves make up for one another; the peak does not."""
    steps, draw, found = steps_of(curve), np.random.default_rng(0), []
    for _ in range(16):
        found.append(fit(steps, curve.at(steps) + 0.03 * np.ptp(curve.at(steps)) * draw.standard_normal(len(steps))))
    for truth, name in ((curve.peak_step, "peak_step"), (curve.peak_height, "peak_height")):
        values = np.array([getattr(each.curve, name) for each in found])
        told = float(np.median([getattr(each, f"{name}_error") for each in found]))
        assert told < 0.05 * truth
        assert abs(values - truth).max() < 4 * told, "no draw of 16 is 4 standard errors off (1 in 1000 by chance)"
        # a standard deviation of 16 draws is within a factor 1.6 of its own, 99 times in 100 (chi squared)
        assert told / 1.6 < values.std(ddof=1) < told * 1.6


@pytest.mark.parametrize("curve", [GOLDEN, DIPPING])
def test_neither_unit_matters(curve: Dynamics) -> None:
    steps = steps_of(curve)
    ratios = curve.at(steps) + 0.5 * np.sin(np.arange(len(steps)) * 2.4)
    one, other = fit(steps, ratios), fit(1000 * steps, 50 * ratios, floor=50.0)
    scaled = one.curve._replace(amplitude=50 * one.curve.amplitude, rate=one.curve.rate / 1000, asymptote=50 * one.curve.asymptote)
    # both see the same numbers up to rounding, and stop at the same iteration but for a last step of ftol's size
    np.testing.assert_allclose(other.curve.at(1000 * steps), scaled.at(1000 * steps), rtol=1e-6)
    assert other.curve.peak_step == pytest.approx(1000 * one.curve.peak_step, rel=1e-4)
    assert other.r2 == pytest.approx(one.r2, abs=1e-9)


def test_the_order_of_points_does_not_matter() -> None:
    steps, draw = steps_of(GOLDEN), np.random.default_rng(0)
    ratios, order = GOLDEN.at(steps) + draw.standard_normal(len(steps)), draw.permutation(len(steps))
    assert fit(steps[order], ratios[order]) == fit(steps, ratios)


def test_early_points_weigh_more() -> None:
    steps = steps_of(GOLDEN, 60)
    ratios = GOLDEN.at(steps) + np.where(steps > 60, 10.0, 0.0)  # what no such curve can do
    is_early = steps < 30

    def squares(early: float) -> float:
        return float(np.sum((fit(steps, ratios, early=early).curve.at(steps) - ratios)[is_early] ** 2))

    assert squares(0.1) < 0.5 * squares(math.inf)


def test_the_asymptote_is_no_ratio_below_one() -> None:
    steps = np.arange(40.0, 120.0, 5.0)  # up and a little down again: the curve would fall on, far below 0
    ratios = 20 - 12 * ((steps - 90) / 50) ** 2
    free, held, lower = fit(steps, ratios, floor=-math.inf), fit(steps, ratios), fit(steps, ratios - 10)
    assert free.curve.asymptote < -100
    # within the distance that counts as at the bound: 1e-3 of ten spreads and what is below
    assert 1 <= held.curve.asymptote < 1 + 0.02 * np.ptp(ratios) and "K" in held.at_bound
    assert lower.curve.asymptote >= (ratios - 10).min(), "a series that goes lower itself"


def test_what_the_series_does_not_determine_is_told() -> None:
    steps = np.arange(1.0, 60.0)
    found = fit(steps, 2 + 5 * np.log(steps + 3))  # rises on: the peak may be anywhere
    assert "beta" in found.at_bound and math.isinf(found.peak_step_error) and found.to_json()["peak_step_error"] is None
    assert found.curve.has_peak and found.curve.peak_step > 600 and found.r2 > 0.999


@pytest.mark.parametrize(
    ("steps", "ratios", "why"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 3, 2, 1], "7 points: five parameters need at least 8"),
        ([], [], "0 points"),
        (list(range(20)), [7.0] * 20, "does not move from 7"),
        (list(range(20)), [7.0 + 1e-12 * (i % 2) for i in range(20)], "does not move"),
    ],
)
def test_no_fit_says_why(steps: list[float], ratios: list[float], why: str) -> None:
    with pytest.raises(FitFailed, match=why):
        fit(steps, ratios)


def test_a_fit_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.optimize

    monkeypatch.setattr(scipy.optimize, "least_squares", lambda _, start, *a, **k: SimpleNamespace(status=0, cost=1.0, x=start))
    with pytest.raises(FitFailed, match="did not converge from any start"):
        fit(steps_of(GOLDEN), GOLDEN.at(steps_of(GOLDEN)))


NO_SERIES = [([1.0] * 9, range(9)), (range(-1, 8), range(9)), (range(9), [math.nan] * 9), (range(9), [1.0])]


@pytest.mark.parametrize(("steps", "ratios"), NO_SERIES)
def test_what_is_no_series_is_refused(steps: list[float], ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="step|columns"):
        fit(list(steps), list(ratios))


@pytest.mark.parametrize("module", ["scipy.special", "scipy.optimize"])
def test_without_scipy_the_fix_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs scipy.*pip install megastab\[analysis\]"):
        _ = GOLDEN.peak_step if module == "scipy.special" else fit(range(9), [1, 2, 4, 5, 4, 3, 2, 1, 1])
