"""AutoClip, AdaGC and SkipStep give the numbers of their definitions, and keep the common rules."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastab.stability.clip_rule import ClipRule
from megastab.stability.rivals import AdaGC, AutoClip, SkipStep, percentile, standard_score

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "zclip.json").read_text())["rivals"]
RULES: dict[str, Callable[[], Any]] = {
    "autoclip": lambda: AutoClip(percentile=50.0),
    "autoclip_window": lambda: AutoClip(percentile=90.0, window=20),
    "adagc": lambda: AdaGC(warmup_steps=10),
    "skipstep": lambda: SkipStep(rolling_interval_length=16),
}


def norms(count: int = 100) -> list[float]:
    draw = random.Random(2)
    return [draw.gauss(1.0, 0.05) * (8.0 if t % 13 == 12 else 1.0) for t in range(count)]


@pytest.mark.parametrize("percent", [10, 90])
def test_autoclip_golden(percent: int) -> None:
    rule = AutoClip(percentile=percent)
    for norm, expected in zip(GOLDEN["autoclip"]["norms"], GOLDEN["autoclip"][str(percent)], strict=True):
        decision = rule.observe(norm)
        assert decision.threshold == pytest.approx(expected, rel=1e-12)
        assert decision.scale == pytest.approx(min(1.0, expected / norm), rel=1e-12)


def test_autoclip_at_ten_clips_nine_steps_in_ten() -> None:
    rule = AutoClip()
    actions = [rule.observe(norm).action for norm in norms(1000)]
    assert 880 <= actions.count("clip") <= 920


def test_autoclip_window_is_the_percentile_of_the_last() -> None:
    rule, stream = AutoClip(percentile=90.0, window=20), norms()
    for t, norm in enumerate(stream):
        assert rule.observe(norm).threshold == pytest.approx(np.percentile(stream[max(0, t - 19) : t + 1], 90.0), rel=1e-12)


@pytest.mark.parametrize("percent", [0.0, 10.0, 33.3, 50.0, 99.0, 100.0])
def test_percentile_is_numpys(percent: float) -> None:
    for count in (1, 2, 7, 50):
        values = sorted(norms(count))
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_adagc_golden() -> None:
    golden = GOLDEN["adagc"]
    rule = AdaGC(**golden["kwargs"])
    for norm, clipped, gamma, scale in zip(golden["norms"], golden["clipped"], golden["gamma"], golden["scale"], strict=True):
        decision = rule.observe(norm)
        # Six digits were kept of the factor, exact values of the rest.
        assert decision.scale == pytest.approx(scale, abs=5e-7) and decision.scale * norm == pytest.approx(clipped, rel=1e-9)
        assert rule.gamma == pytest.approx(gamma, rel=1e-8)


def test_adagc_of_one_tensor_among_many_warms_up_by_the_global_norm() -> None:
    rule = AdaGC(warmup_steps=2)
    first, second = rule.observe(0.3, global_norm=2.0), rule.observe(0.3, global_norm=0.5)
    assert first.scale == pytest.approx(0.5) and first.threshold == pytest.approx(0.15) and second.scale == 1.0
    assert rule.gamma == pytest.approx(0.15) and rule.observe(0.3, global_norm=99.0).scale == pytest.approx(1.05 * 0.15 / 0.3)
    assert rule.observe(0.3, global_norm=math.inf).action == "skip"


def test_adagc_leaves_a_lasting_rise_slowly() -> None:
    rule = AdaGC(warmup_steps=10)
    for _ in range(10):
        rule.observe(0.5)
    actions = [rule.observe(1.0).action for _ in range(1000)]
    assert actions.index("apply") == 645  # 0.1 % a step: ln(2 / 1.05) / ln(1.001)
    assert actions[645:] == ["apply"] * 355


def test_adagc_is_not_locked_by_a_zero() -> None:
    rule = AdaGC(warmup_steps=2)
    for norm in (1.0, 0.0, 1.0, 0.0, 1.0):
        decision = rule.observe(norm)
    assert decision.scale == 1.0 and rule.gamma == 1.0


def skipped(loss_at: dict[int, float], **kwargs: Any) -> list[int]:
    """Steps skipped of the 300 in which norms of 10 come at 100, 101, 102 and 110."""
    rule = SkipStep(max_nonfinite_in_a_row=None, **kwargs)
    out = []
    for t in range(300):
        loss = loss_at.get(t, 2 + 0.01 * ((7 * t) % 11 - 5))
        norm = 10.0 if t in (100, 101, 102, 110) else 1 + 0.02 * ((5 * t) % 13 - 6)
        if rule.observe(norm, loss).action == "skip":
            out.append(t)
    return out


@pytest.mark.parametrize("compat", [False, True])
def test_skipstep_accepts_the_fourth_outlier(compat: bool) -> None:
    assert skipped({}, compat=compat) == [100, 101, 102]
    assert skipped({30: 9.0}, compat=compat) == [100, 101, 102]  # inactive below 64 values


def test_skipstep_skips_an_outlying_loss() -> None:
    assert skipped({200: 9.0}) == [100, 101, 102, 200]


def test_skipstep_forgets_a_loss_that_is_not_finite_unless_compat() -> None:
    assert skipped({150: math.nan}) == [100, 101, 102, 150]
    assert skipped({150: math.nan}, compat=True) == [100, 101, 102, *range(150, 279)]


def test_skipstep_begins_with_half_a_window() -> None:
    for count, action in ((62, "apply"), (63, "skip")):
        rule = SkipStep()
        for norm in norms(12) * 6:
            if len(rule.norms) < count:
                rule.observe(norm)
        assert rule.observe(50.0).action == action


def test_skipstep_without_a_loss_looks_at_the_norm() -> None:
    rule = SkipStep(rolling_interval_length=8)
    for norm in (1.0, 1.1, 0.9, 1.0):
        assert rule.observe(norm).action == "apply"
    decision = rule.observe(3.0)
    assert (decision.action, decision.scale, decision.threshold) == ("skip", 0.0, None) and "the norm is" in decision.reason


def test_standard_score() -> None:
    assert standard_score(3.0, [1.0]) is None
    assert standard_score(4.0, [1.0, 3.0]) == pytest.approx(2 / math.sqrt(2))
    assert standard_score(1.0, [1.0, 1.0]) == 0.0 and standard_score(2.0, [1.0, 1.0]) == math.inf


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_bad_norm_costs_one_step(name: str, bad: float) -> None:
    clean, hit = RULES[name](), RULES[name]()
    for t, norm in enumerate(norms()):
        if t in (0, 5, 50):
            decision = hit.observe(bad)
            assert (decision.action, decision.scale) == ("skip", 0.0)
        assert hit.observe(norm) == clean.observe(norm)
    assert hit.num_nonfinite == 3


@pytest.mark.parametrize("name", RULES)
def test_too_many_bad_norms_stop_the_run(name: str) -> None:
    rule: ClipRule = RULES[name]()
    for _ in range(8):
        rule.observe(math.nan)
    with pytest.raises(FloatingPointError):
        rule.observe(math.nan)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("when", [0, 3, 10, 50])
def test_resume_changes_nothing(name: str, when: int) -> None:
    stream = norms()
    whole, first, second = RULES[name](), RULES[name](), RULES[name]()
    expected = [whole.observe(norm) for norm in stream]
    got = [first.observe(norm) for norm in stream[:when]]
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False))) == []
    assert got + [second.observe(norm) for norm in stream[when:]] == expected
    assert second.state_dict() == whole.state_dict()


def test_other_settings_are_warned_of_and_the_state_kept() -> None:
    rule = AutoClip()
    for norm in norms(30):
        rule.observe(norm)
    other = AutoClip(percentile=50.0, window=10)
    with pytest.warns(UserWarning, match=r"AutoClip goes on with other settings \(percentile 10.0 -> 50.0; window None -> 10\)"):
        assert len(other.load_state_dict(rule.state_dict())) == 2
    assert list(other.history) == norms(30)[-10:]
    expected = np.percentile([*norms(30)[-9:], 1.0], 50.0)
    assert other.observe(1.0).threshold == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AutoClip(percentile=101.0), "from 0 to 100"),
        (lambda: AutoClip(window=0), "or None for the whole history"),
        (lambda: AdaGC(lambda_rel=0.9), "lambda_rel must be at least 1"),
        (lambda: AdaGC(lambda_abs=0.0), "lambda_abs must be above 0"),
        (lambda: AdaGC(beta=1.0), "beta must be between 0 and 1"),
        (lambda: AdaGC(warmup_steps=0), "the average starts there"),
        (lambda: SkipStep(rolling_interval_length=1), "at least 2"),
        (lambda: SkipStep(sigma_factor=0.0), "sigma_factor must be above 0"),
    ],
)
def test_settings_without_sense_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
