"""ZClip over long streams of norms: it leaves a level that has changed, and does not leave one that has not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from megastab.stability.zclip import ZClip

VARIANTS: list[dict[str, Any]] = [
    {},
    {"mode": "mean"},
    {"mode": "max"},
    {"skip_update_on_spike": True},
    {"mode": "mean", "skip_update_on_spike": True},
    {"variance": "west"},
]
FACTORS = (1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)
NOISES: dict[str, Callable[[random.Random], float]] = {
    "gaussian_5_percent": lambda draw: draw.gauss(1.0, 0.05),
    "log_normal_0.3": lambda draw: draw.lognormvariate(0.0, 0.3),
    "gamma_4": lambda draw: draw.gammavariate(4.0, 0.25),
}


def name(kwargs: dict[str, Any]) -> str:
    return "-".join(str(value) for value in kwargs.values()) or "default"


def gaussian(rule: ZClip, draw: random.Random, level: float, steps: int) -> int:
    """Spikes among so many norms around a level, with 5 % noise."""
    before = rule.num_spikes
    for _ in range(steps):
        rule.observe(level * draw.gauss(1.0, 0.05))
    return rule.num_spikes - before


@pytest.mark.parametrize("kwargs", VARIANTS, ids=name)
@pytest.mark.parametrize("seed", range(4))
def test_a_lasting_shift_costs_at_most_sixty_clipped_steps(kwargs: dict[str, Any], seed: int) -> None:
    for factor in FACTORS:
        draw, rule = random.Random(seed), ZClip(**kwargs)
        gaussian(rule, draw, 1.0, 500)
        assert rule.num_rewarms == 0
        in_escape = gaussian(rule, draw, factor, 100)
        assert in_escape <= 60, factor
        assert gaussian(rule, draw, factor, 900) <= 36, factor  # 4 %: no more than stationary noise gives
        assert rule.num_rewarms <= 1 and rule.mean == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_the_default_spends_at_most_sixty_in_three_thousand_steps(seed: int) -> None:
    for factor in FACTORS[2:]:
        draw, rule = random.Random(seed), ZClip()
        gaussian(rule, draw, 1.0, 500)
        assert gaussian(rule, draw, factor, 3000) <= 60, factor  # the stationary 1 % included
        assert rule.num_rewarms == 1


def test_the_released_form_never_leaves() -> None:
    draw, rule = random.Random(0), ZClip(compat=True)
    gaussian(rule, draw, 1.0, 500)
    assert gaussian(rule, draw, 2.0, 3000) == 3000


@pytest.mark.parametrize("kwargs", [{}, {"mode": "mean"}, {"mode": "max"}, {"skip_update_on_spike": True}], ids=name)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", range(2))
def test_stationary_noise_is_no_new_level(kwargs: dict[str, Any], noise: str, seed: int) -> None:
    draw, rule, norm = random.Random(seed), ZClip(**kwargs), NOISES[noise]
    for _ in range(40_000):
        rule.observe(norm(draw))
    assert rule.num_rewarms == 0
    # Measured: 1.0, 3.5 and 3.8 % in the default form, up to 8.4 % for "mean", whose sigma shrinks most.
    assert rule.num_spikes / 40_000 < (0.015 if noise == "gaussian_5_percent" else 0.09)


@pytest.mark.parametrize("noise", ["log_normal_0.3", "gamma_4"])
@pytest.mark.parametrize("factor", [2.0, 3.0, 10.0])
def test_a_shift_under_skewed_noise_is_left_too(noise: str, factor: float) -> None:
    for seed in range(3):
        draw, rule, norm = random.Random(seed), ZClip(), NOISES[noise]
        for _ in range(500):
            rule.observe(norm(draw))
        before = rule.num_spikes
        for _ in range(100):
            rule.observe(factor * norm(draw))
        assert rule.num_spikes - before <= 60
        before = rule.num_spikes
        for _ in range(1000):
            rule.observe(factor * norm(draw))
        assert rule.num_spikes - before <= 60  # 6 %, stationary 3.9 %


@pytest.mark.parametrize("length", [5, 15, 19])
def test_a_burst_shorter_than_twenty_is_clipped_and_forgotten(length: int) -> None:
    draw, rule = random.Random(3), ZClip()
    gaussian(rule, draw, 1.0, 500)
    assert gaussian(rule, draw, 10.0, length) == length
    gaussian(rule, draw, 1.0, 200)
    assert rule.num_rewarms == 0 and rule.mean == pytest.approx(1.0, rel=0.05)


def test_the_twentieth_spike_restarts_from_the_raw_norms_and_says_so() -> None:
    draw, rule = random.Random(3), ZClip()
    gaussian(rule, draw, 1.0, 500)
    decisions = [rule.observe(10.0 + 0.01 * k) for k in range(21)]
    assert [d.action for d in decisions] == ["clip"] * 20 + ["apply"]
    assert "20 spikes in 25 steps are a new level, 10.09" in decisions[19].reason and "new level" not in decisions[18].reason
    assert decisions[20].z == pytest.approx((10.2 - 10.095) / rule.std, rel=0.1) and rule.num_rewarms == 1
    assert rule.observe(100.0).action == "clip" and rule.num_rewarms == 1  # the twenty are forgotten with the level


@pytest.mark.parametrize(("gap", "is_left"), [(5, True), (6, False)])
def test_the_window_counts_steps(gap: int, is_left: bool) -> None:
    draw, rule = random.Random(3), ZClip()
    gaussian(rule, draw, 1.0, 500)
    rule.spike_times.clear()
    for k in range(20):
        rule.observe(10.0)
        for _ in range(gap if k == 9 else 0):
            rule.observe(0.9)
    assert (rule.num_rewarms == 1) is is_left


def test_the_hatch_can_be_shut() -> None:
    draw, rule = random.Random(3), ZClip(rewarm_clipped=0)
    gaussian(rule, draw, 1.0, 500)
    assert gaussian(rule, draw, 2.0, 1000) == 1000 and rule.num_rewarms == 0


def test_an_announced_change_collects_anew() -> None:
    draw, rule = random.Random(0), ZClip(max_grad_norm=20.0)
    gaussian(rule, draw, 1.0, 100)
    rule.notify_regime_change("batch size 256 -> 512")
    assert rule.phase == "rewarm" and rule.std is None and rule.threshold == 20.0
    first = rule.observe(5.0)
    assert first.z is None and first.action == "apply" and first.reason == "ZClip warms up anew: batch size 256 -> 512"
    assert rule.observe(50.0).scale == 0.4
    assert gaussian(rule, draw, 5.0, 23) == 0 and rule.phase == "active" and rule.mean == pytest.approx(5.0, rel=0.05)


def test_a_change_during_warmup_starts_the_collection_over() -> None:
    rule = ZClip(warmup_steps=3)
    rule.observe(100.0)
    rule.notify_regime_change()
    for norm in (1.0, 1.1, 0.9):
        rule.observe(norm)
    assert rule.mean == 1.0
