"""ZClip and norms that are none, are zero, or are of any size."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from megastab.stability.zclip import ZClip

BAD = (math.nan, math.inf, -math.inf, -1.0, 1e200)
VARIANTS: list[dict[str, Any]] = [{}, {"compat": True}, {"mode": "mean", "max_grad_norm": 1.0}, {"skip_update_on_spike": True}]


def norms(count: int, seed: int = 0) -> list[float]:
    """Ordinary norms with a spike now and then, and a lasting shift at 60."""
    draw = random.Random(seed)
    return [draw.gauss(1.0, 0.05) * (3.0 if t >= 60 else 1.0) * (8.0 if t % 13 == 12 else 1.0) for t in range(count)]


def memory(rule: ZClip) -> dict[str, Any]:
    """The state but for what counts bad norms."""
    return {key: value for key, value in rule.state_dict().items() if "nonfinite" not in key}


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_norm_costs_one_step_in_any_phase(bad: float, kwargs: dict[str, Any]) -> None:
    stream = norms(120)
    for when in (0, 10, 24, 25, 26, 70, 85, 119):
        clean, hit = ZClip(**kwargs), ZClip(**kwargs)
        for t, norm in enumerate(stream):
            if t == when:
                decision = hit.observe(bad)
                assert (decision.action, decision.scale, decision.z) == ("skip", 0.0, None) and decision.reason
            assert hit.observe(norm) == clean.observe(norm), (when, t)
        assert memory(hit) == memory(clean) and hit.num_nonfinite == 1 and clean.num_nonfinite == 0


def test_the_reason_names_what_was_wrong() -> None:
    assert ZClip().observe(math.nan).reason == "the gradient norm is not finite"
    assert ZClip().observe(-math.inf).reason == "the gradient norm is not finite"
    assert ZClip().observe(-1.0).reason == "the gradient norm is -1, which no norm is"


def test_too_many_in_a_row_stop_the_run() -> None:
    rule = ZClip(max_nonfinite_in_a_row=3)
    for _ in range(2):
        for _ in range(3):
            assert rule.observe(math.nan).action == "skip"
        assert rule.observe(1.0).action == "apply"
    for _ in range(3):
        rule.observe(math.inf)
    with pytest.raises(FloatingPointError, match="4 steps in a row"):
        rule.observe(math.nan)
    patient = ZClip(max_nonfinite_in_a_row=None)
    assert {patient.observe(math.nan).action for _ in range(100)} == {"skip"}


def test_a_zero_norm_is_applied_and_not_counted() -> None:
    stream = norms(50)
    clean, hit = ZClip(), ZClip()
    for t, norm in enumerate(stream):
        if t in (0, 24, 25, 40):
            decision = hit.observe(0.0)
            assert (decision.action, decision.scale, decision.z) == ("apply", 1.0, None) and "zero" in decision.reason
        assert hit.observe(norm) == clean.observe(norm)
    assert memory(hit) == memory(clean)


def test_only_zeros_never_begin_and_never_fail() -> None:
    rule = ZClip()
    assert {rule.observe(0.0).action for _ in range(100)} == {"apply"} and rule.phase == "warmup"
    assert rule.observe(1.0).action == "apply"


def test_compat_skips_where_the_released_code_multiplies_by_zero() -> None:
    rule = ZClip(compat=True)
    for _ in range(25):
        rule.observe(0.0)
    decision = rule.observe(1.0)
    assert rule.mean == 0.0 and (decision.action, decision.scale) == ("skip", 0.0) and "no factor" in decision.reason


def test_a_factor_that_fp32_cannot_hold_is_a_skip() -> None:
    rule = ZClip(max_grad_norm=1e-3)
    assert rule.observe(1e36).action == "skip" and rule.num_seen == 0
    for norm in norms(30):
        rule.observe(norm)
    before = memory(rule)
    assert rule.observe(1e37).action == "skip" and memory(rule) == before
    assert rule.observe(1e30).action == "clip"


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40, 2.0**-400, 2.0**400])
@pytest.mark.parametrize("kwargs", [{}, {"mode": "mean"}, {"mode": "max", "clip_factor": 0.7}, {"variance": "west"}], ids=str)
def test_decisions_do_not_depend_on_the_unit(factor: float, kwargs: dict[str, Any]) -> None:
    plain, scaled = ZClip(**kwargs), ZClip(**kwargs)
    for norm in norms(300):
        mine, theirs = plain.observe(norm), scaled.observe(factor * norm)
        # Powers of two scale without rounding, so equality is exact.
        assert (mine.z, mine.scale, mine.action) == (theirs.z, theirs.scale, theirs.action)
        assert mine.threshold is None or mine.threshold * factor == theirs.threshold


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e12])
def test_tiny_and_huge_norms_are_judged_alike(factor: float) -> None:
    plain, scaled = ZClip(), ZClip()
    for norm in norms(300):
        mine, theirs = plain.observe(norm), scaled.observe(factor * norm)
        # z loses digits where the norm is close to the mean: 1e-16 of the norm over a sigma of 5 % of it, averaged.
        assert mine.action == theirs.action and mine.scale == pytest.approx(theirs.scale, rel=1e-11)
        assert mine.z is None or mine.z == pytest.approx(theirs.z, rel=1e-9, abs=1e-9)


def test_the_released_form_is_blind_to_tiny_norms() -> None:
    rule = ZClip(compat=True)
    for norm in norms(30)[:25]:
        rule.observe(1e-7 * norm)
    assert rule.observe(3e-7).action == "apply"


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_what_a_decision_says_is_consistent(kwargs: dict[str, Any]) -> None:
    rule, draw = ZClip(**kwargs), random.Random(5)
    for _ in range(2000):
        norm = draw.lognormvariate(0.0, 1.5)
        decision = rule.observe(norm)
        assert 0.0 < decision.scale <= 1.0 and (decision.action == "clip") == (decision.scale < 1.0)
        if decision.action == "clip":
            # 2e-6 relative to 1e-6 added: compat divides by the norm plus 1e-6.
            assert decision.threshold is not None and decision.scale * norm == pytest.approx(decision.threshold, rel=1e-4)
        elif decision.threshold is not None:
            assert norm <= decision.threshold
