"""ZClip's arithmetic: the released package's golden numbers, closed forms of the default form, and its settings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from megastab.stability.clip_rule import ClipDecision, ClipRule
from megastab.stability.norm_statistics import median, plain_sample, robust_sample
from megastab.stability.zclip import ZClip

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "zclip.json").read_text())
SEQUENCE = GOLDEN["sequence"]
MODES = ("reciprocal", "mean", "max")


def ours(mode: str = "zscore", clip_option: str = "adaptive_scaling", **kwargs: Any) -> dict[str, Any]:
    """The released package's arguments as ours."""
    name = "max" if mode == "percentile" else {"adaptive_scaling": "reciprocal", "mean": "mean"}[clip_option]
    return {"mode": name, "compat": True, **kwargs}


def knowing(mean: float, std: float, **kwargs: Any) -> ZClip:
    """A ZClip past its warm-up with these statistics."""
    rule = ZClip(**kwargs)
    rule.mean, rule.var = mean, std * std
    return rule


@pytest.mark.parametrize("name", sorted(GOLDEN["configs"]))
def test_compat_gives_the_released_numbers(name: str) -> None:
    config = GOLDEN["configs"][name]
    rule = ZClip(**ours(**config["kwargs"]))
    for norm in SEQUENCE[:25]:
        assert rule.observe(norm).z is None
    assert rule.mean == pytest.approx(GOLDEN["warmed_up"]["mean"], rel=1e-14)
    assert rule.var == pytest.approx(GOLDEN["warmed_up"]["var"], rel=1e-14)
    for norm, (step, z, out, mean, var) in zip(SEQUENCE[25:], config["rows"], strict=True):
        decision = rule.observe(norm)
        # 1e-12: from Python 3.12 on sum() rounds once, the numbers were made with one that rounds at each step.
        assert (decision.z, norm * decision.scale) == pytest.approx((z, out), rel=1e-12, abs=1e-12), step
        assert (rule.mean, rule.var) == pytest.approx((mean, var), rel=1e-12), step


def test_compat_clips_to_the_cap_during_warmup() -> None:
    rule = ZClip(max_grad_norm=1.0, compat=True)
    out = [norm * rule.observe(norm).scale for norm in SEQUENCE[:25]]
    assert out == pytest.approx(GOLDEN["warmup_of_H"], rel=1e-14)


def test_compat_counts_a_zero_norm_as_released() -> None:
    rule, expected = ZClip(compat=True), GOLDEN["after_a_zero"]
    for norm in [*SEQUENCE[:25], 0.0]:
        rule.observe(norm)
    assert (rule.mean, rule.var) == pytest.approx((expected["mean"], expected["var"]), rel=1e-9)
    assert 100.0 * rule.observe(100.0).scale == pytest.approx(expected["then_100_becomes"], rel=1e-7)


@pytest.mark.parametrize("compat", [True, False])
def test_clip_value_falls_with_the_size_of_a_spike(compat: bool) -> None:
    for norm, expected in GOLDEN["clip_value_of_mean_1_std_0.1"].items():
        decision = knowing(1.0, 0.1, compat=compat).observe(float(norm))
        if expected is None:
            assert decision.action == "apply" and decision.scale == 1.0
        else:  # 2e-6: six digits were kept, and compat adds 1e-6 to sigma
            assert decision.action == "clip" and decision.threshold == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("mode", "target"), [("reciprocal", 1 + 0.1 * 6.25 / 10), ("mean", 1.0), ("max", 1.25)])
def test_each_mode_is_its_formula(mode: Any, target: float) -> None:
    rule = knowing(1.0, 0.1, mode=mode)
    decision = rule.observe(2.0)
    assert decision == ClipDecision(pytest.approx(target), pytest.approx(target / 2), pytest.approx(10.0), "clip", "z 10 is above 2.5")
    mean = 0.97 + 0.03 * target
    assert rule.mean == pytest.approx(mean) and rule.var == pytest.approx(0.97 * 0.01 + 0.03 * (target - mean) ** 2)


def test_max_and_reciprocal_are_continuous_at_the_edge() -> None:
    edge = 1.25
    for mode in ("reciprocal", "max"):
        below, above = (knowing(1.0, 0.1, mode=mode).observe(edge * (1 + e)) for e in (-1e-9, 1e-9))
        assert below.action == "apply" and above.scale == pytest.approx(1.0, abs=1e-8)
        assert below.threshold == pytest.approx(above.threshold, rel=1e-8) == pytest.approx(edge)


def test_a_norm_at_or_below_the_edge_is_left_alone() -> None:
    for norm in (1e-6, 0.5, 1.0, 1.2):
        decision = knowing(1.0, 0.1).observe(norm)
        assert decision.scale == 1.0 and decision.action == "apply" and decision.reason == ""
        assert decision.threshold == pytest.approx(1.25) and decision.z == pytest.approx((norm - 1) / 0.1)


def test_warmup_takes_median_and_mad() -> None:
    norms = [1.0, 1.1, 0.9, 1000.0, 1.05]
    rule = ZClip(warmup_steps=5)
    decisions = [rule.observe(norm) for norm in norms]
    assert all(d == ClipDecision(None, 1.0, None, "apply") for d in decisions)
    assert rule.mean == 1.05 and rule.std == pytest.approx(1.4826 * 0.05)
    assert rule.phase == "active" and ZClip().phase == "warmup"


def test_a_transient_at_the_start_does_not_blind() -> None:
    rule = ZClip()
    for t in range(25):
        rule.observe(1 + 20 * math.exp(-t / 4))
    # The released package stands at 17.75 here; the first of the figures measured with the prototype is 5.4.
    assert rule.threshold == pytest.approx(5.4, abs=0.05)
    released = ZClip(compat=True)
    for t in range(25):
        released.observe(1 + 20 * math.exp(-t / 4))
    assert released.threshold == pytest.approx(17.75, abs=0.005)


def test_equal_norms_do_not_lock_in() -> None:
    rule = ZClip()
    for _ in range(25):
        rule.observe(1.0)
    assert rule.var == 0.0 and rule.std == 1e-3
    assert rule.observe(1.002).action == "apply"  # within 2.5 sigmas of the floor
    assert rule.observe(2.0).action == "clip" and rule.var > 0.0
    stuck = ZClip(compat=True, warmup_steps=1)
    out = [norm * stuck.observe(norm).scale for norm in (1.0, 1.2, 1.3, 1.4)]
    assert out == pytest.approx([1.0, 0.99999917, 0.99999923, 0.99999929], abs=5e-9) and stuck.var == 0.0


def test_clip_factor_acts_on_the_sigma_term_only() -> None:
    assert knowing(1.0, 0.1, mode="max", clip_factor=0.5).observe(2.0).threshold == pytest.approx(1.125)
    assert knowing(1.0, 0.1, mode="mean", clip_factor=0.5).observe(2.0).threshold == 1.0
    assert knowing(1.0, 0.1, clip_factor=0.5).observe(2.0).threshold == pytest.approx(1 + 0.5 * 0.0625)
    whole = knowing(1.0, 0.1, clip_factor=0.5, compat=True, eps=0.0).observe(2.0).threshold
    assert whole == pytest.approx(0.5 * 1.0625)


def test_spikes_enter_the_statistics_clipped_or_not_at_all() -> None:
    fed, unfed = knowing(1.0, 0.1), knowing(1.0, 0.1, skip_update_on_spike=True)
    assert fed.observe(5.0) == unfed.observe(5.0)
    assert fed.mean == pytest.approx(0.97 + 0.03 * (1 + 0.1 * 6.25 / 40))
    assert (unfed.mean, unfed.var) == (1.0, 0.1 * 0.1)


def test_west_is_the_exact_weighted_variance() -> None:
    rule, expected = knowing(0.996, 0.004032**0.5, variance="west"), GOLDEN["variance_of_A"]["west"]
    for norm in SEQUENCE[25:]:
        rule.observe(norm)
    # 2e-5: the golden run adds 1e-6 to a sigma of .06 in z.
    assert (rule.mean, rule.var) == pytest.approx((expected["mean"], expected["var"]), rel=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_cap_and_spike_take_the_lower(mode: Any) -> None:
    decision = knowing(1.0, 0.1, mode=mode, max_grad_norm=0.5).observe(2.0)
    assert decision.threshold == 0.5 and decision.scale == 0.25 and "z 10" in decision.reason
    decision = knowing(1.0, 0.5, mode=mode, max_grad_norm=1.5).observe(2.0)
    assert (decision.threshold, decision.scale, decision.action, decision.reason) == (1.5, 0.75, "clip", "")
    decision = ZClip(mode=mode, max_grad_norm=1.5).observe(2.0)
    assert (decision.threshold, decision.scale, decision.z, decision.action) == (1.5, 0.75, None, "clip")


def test_the_cap_is_fed_back_only_when_asked() -> None:
    raw, capped = (knowing(1.0, 0.5, max_grad_norm=1.5, cap_statistics=on) for on in (False, True))
    assert raw.observe(2.0).z == pytest.approx(2.0) and raw.mean == pytest.approx(0.97 + 0.06)
    assert capped.observe(2.0).z == pytest.approx(1.0) and capped.mean == pytest.approx(0.97 + 0.045)


def test_a_cap_below_the_usual_norm_is_told() -> None:
    rule = ZClip(max_grad_norm=0.5)
    for norm in SEQUENCE[:24]:
        rule.observe(norm)
    with pytest.warns(UserWarning, match=r"max_grad_norm 0\.5 is below the usual norm"):
        decision = rule.observe(SEQUENCE[24])
    assert rule.is_inert and "ZClip on none" in decision.reason and decision.scale == pytest.approx(0.5 / SEQUENCE[24])
    assert "ZClip on none" not in rule.observe(1.0).reason and not ZClip(max_grad_norm=0.5).is_inert


def test_spike_counters() -> None:
    rule = knowing(1.0, 0.1)
    for norm in (5.0, 5.0, 1.0, 5.0):
        rule.observe(norm)
    assert (rule.num_seen, rule.num_spikes, rule.spikes_in_a_row) == (4, 3, 1)
    assert rule.spike_rate == pytest.approx(0.03 * (0.97**3 + 0.97**2 + 1))


def test_samples() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0 and median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert plain_sample([1.0, 3.0]) == (2.0, 1.0)
    assert robust_sample([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1.4826**2))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"alpha": 1.0}, "alpha must be between 0 and 1"),
        ({"z_thresh": 0.0}, "z_thresh must be above 0"),
        ({"mode": "zscore"}, 'of the released package is "reciprocal"'),
        ({"mode": "percentile"}, 'of the released package is "max"'),
        ({"mode": "median"}, "mode must be one of reciprocal, mean, max"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"max_grad_norm": 0.0}, "or None for no cap"),
        ({"clip_factor": 0.0}, "clip_factor must be above 0"),
        ({"clip_factor": 1.5}, "clip_factor must be at most 1"),
        ({"relative_eps": 0.0}, "relative_eps must be above 0"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"variance": "plain"}, "variance must be one of paper, west"),
        ({"rewarm_clipped": 26}, "from 0 (off) to rewarm_window"),
        ({"cap_statistics": True}, "False without a max_grad_norm"),
        ({"compat": True, "variance": "west"}, "the released package knows no other"),
        ({"compat": True, "cap_statistics": True, "max_grad_norm": 1.0}, "the released package has no such thing"),
        ({"on_change": "stop"}, "on_change must be one of"),
        ({"max_nonfinite_in_a_row": 0}, "or None for no limit"),
    ],
)
def test_settings_without_sense_are_refused_with_a_way_out(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ZClip(**kwargs)
    assert said in str(refusal.value)


def test_a_decision_is_frozen_and_the_rule_a_rule() -> None:
    rule: ClipRule = ZClip()
    with pytest.raises(FrozenInstanceError):
        rule.observe(1.0).scale = 2.0  # type: ignore[misc]


def test_importing_it_imports_neither_torch_nor_deepspeed() -> None:
    code = "import megastab, sys; megastab.ZClip; megastab.StepRecord; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
