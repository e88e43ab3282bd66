from __future__ import annotations

import math
import random
from statistics import fmean, pstdev

import numpy as np
import pytest

from megastab.report.spike_score import CHUNK, MIN_PREVIOUS, fitted_window, spike_score


def by_definition(values: list[float], window: int, sigmas: float = 7.0) -> float:
    judged = range(window, len(values))
    spikes = [i for i in judged if values[i] >= fmean(values[i - window : i]) + sigmas * pstdev(values[i - window : i])]
    return 100 * len(spikes) / len(judged)


def test_it_is_the_published_score() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.05, 5000)
    values[[2000, 3000, 3001]] = 3.0, 2.0, 2.0
    assert spike_score(list(values)) == pytest.approx(0.075)  # 3 of the 4000 values that have 1000 before them


@pytest.mark.parametrize("sigmas", [2.0, 3.0, 7.0])
def test_it_is_the_definition_over_more_than_one_chunk(sigmas: float) -> None:
    draw = random.Random(3)
    values = [draw.gauss(5, 1) + (40 if i in (500, CHUNK, CHUNK + 119, CHUNK + 120, 2300) else 0) for i in range(2400)]
    score = spike_score(values, window=120, sigmas=sigmas)
    assert score == by_definition(values, 120, sigmas) and score > 0


def test_a_rise_counts_and_a_fall_does_not() -> None:
    noise = [1.0 + 0.01 * (i % 2) for i in range(300)]
    assert spike_score([*noise, 9.0], window=300) == pytest.approx(100 / (301 - 150))
    assert spike_score([*noise, -9.0], window=300) == 0.0


def test_exactly_seven_deviations_is_a_spike() -> None:
    before = [-1.0, 1.0] * 100  # mean 0, deviation 1
    assert spike_score([*before, 7.0], window=200, sigmas=7.0) > 0
    assert spike_score([*before, 6.99], window=200, sigmas=7.0) == 0.0


def test_equal_values_are_no_spikes() -> None:
    assert spike_score([0.1] * 500) == 0.0


def test_what_is_not_finite_is_a_spike_and_enters_no_window() -> None:
    draw = random.Random(0)
    clean = [draw.gauss(1, 0.1) for _ in range(400)]
    broken = [*clean[:250], math.nan, math.inf, *clean[250:]]
    assert spike_score(clean) == 0.0
    assert spike_score(broken) == pytest.approx(100 * 2 / 202)  # 200 finite values judged, two that are not
    assert spike_score([math.nan, *clean]) == 0.0  # nothing before it to judge it by


@pytest.mark.parametrize(("values", "window"), [(50, 100), (200, 100), (300, 150), (2000, 1000), (90_000, 1000)])
def test_a_short_run_has_a_shorter_window(values: int, window: int) -> None:
    assert fitted_window(values) == window


def test_too_few_values_have_no_score() -> None:
    assert math.isnan(spike_score([1.0] * MIN_PREVIOUS)) and math.isnan(spike_score([]))
    assert spike_score([1.0] * (MIN_PREVIOUS + 1)) == 0.0
    assert math.isnan(spike_score([math.nan] * 500))


def test_a_window_without_deviation_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 2"):
        spike_score([1.0] * 500, window=1)
