"""The table of what is done about a bad step, line by line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megastab.config.schema_stability import PolicyConfig
from megastab.stability.clip_rule import ClipDecision
from megastab.stability.loss_spikes import FEWEST, LossSpikes
from megastab.stability.policy import Policy

ORDINARY = ClipDecision(2.0, 1.0, 0.1, "apply")
SPIKE = ClipDecision(2.0, 0.5, 4.0, "clip", "z 4 is above 2.5")
BAD = ClipDecision(None, 0.0, None, "skip", "the gradient norm is not finite")


def policy(**changes: object) -> Policy:
    return Policy(PolicyConfig(**changes), z_thresh=2.5)  # type: ignore[arg-type]


def test_a_bad_norm_is_skipped_until_there_are_too_many() -> None:
    table = policy(max_nonfinite_in_a_row=2)
    assert table.at_norm(math.inf, BAD) is BAD and table.at_norm(math.nan, BAD) is BAD
    assert table.at_norm(1.0, ORDINARY) is ORDINARY  # starts the count again
    table.at_norm(math.inf, BAD)
    table.at_norm(math.inf, BAD)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        table.at_norm(math.inf, BAD)


def test_stop_ends_the_run_at_once_and_null_never() -> None:
    with pytest.raises(FloatingPointError, match="on_nonfinite is stop"):
        policy(on_nonfinite="stop").at_norm(math.inf, BAD)
    patient = policy(max_nonfinite_in_a_row=None)
    for _ in range(100):
        patient.at_norm(math.inf, BAD)


def test_only_the_first_bad_step_of_a_run_wants_a_replay() -> None:
    table = policy()
    wanted = []
    for norm in (1.0, math.inf, math.inf, 1.0, math.inf):
        table.at_norm(norm, BAD if norm == math.inf else ORDINARY)
        wanted.append(table.wants_replay)
    assert wanted == [False, True, False, False, False]
    off = policy(replay_nonfinite=False)
    off.at_norm(math.inf, BAD)
    assert not off.wants_replay
    resumed = policy()
    resumed.load_state_dict(json.loads(json.dumps(table.state_dict())))
    resumed.at_norm(math.inf, BAD)
    assert not resumed.wants_replay


def test_a_spike_is_clipped_or_skipped_as_told() -> None:
    assert policy().at_norm(8.0, SPIKE) is SPIKE
    decision = policy(on_spike="skip").at_norm(8.0, SPIKE)
    assert decision.action == "skip" and decision.scale == 0.0 and decision.reason == SPIKE.reason
    at_the_cap = ClipDecision(2.0, 0.9, 1.0, "clip")
    assert policy(on_spike="skip").at_norm(2.2, at_the_cap) is at_the_cap


def test_bad_steps_in_a_row_ask_for_a_rewind_and_clipped_ones_do_not() -> None:
    table = policy(rewind_after=3)
    for step in range(1, 20):
        table.at_norm(8.0, SPIKE)
        assert not table.after_step(step, 2.0).rewind
    for step in (20, 21):
        table.at_norm(math.inf, BAD)
        assert not table.after_step(step, math.nan).rewind
    table.at_norm(math.inf, BAD)
    verdict = table.after_step(22, math.nan)
    assert "3 bad steps in a row, from step 20" in verdict.rewind and verdict.first_bad_step == 20
    table.at_norm(1.0, ORDINARY)
    assert table.after_step(23, 2.0).first_bad_step is None


def test_an_overflow_of_the_loss_scale_is_counted_by_nobody() -> None:
    table = policy(rewind_after=1)
    assert table.after_step(1, math.nan, is_overflow=True).rewind == "" and table.bad_in_a_row == 0


def test_loss_outliers_are_bad_steps_and_do_not_teach() -> None:
    table, draw = policy(rewind_after=4), np.random.default_rng(0)
    for step in range(FEWEST):
        assert table.after_step(step, 3.0 + 0.05 * draw.standard_normal()).loss_spike == ""
    verdicts = [table.after_step(100 + i, 6.0) for i in range(4)]
    assert all("robust deviations" in verdict.loss_spike for verdict in verdicts)
    assert [bool(verdict.rewind) for verdict in verdicts] == [False, False, False, True] and verdicts[-1].first_bad_step == 100
    assert table.after_step(104, 6.0).loss_spike == ""  # after a rewind the window begins anew


def test_state_goes_on_as_if_never_interrupted() -> None:
    first, second = policy(rewind_after=4), policy(rewind_after=4)
    for step in range(40):
        first.at_norm(1.0 + 0.01 * (step % 3), ORDINARY)
        first.after_step(step, 3.0 + 0.01 * (step % 5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.after_step(41, 9.0) == second.after_step(41, 9.0) and first.state_dict() == second.state_dict()


@pytest.mark.parametrize("seed", range(3))
def test_a_training_curve_with_noise_has_no_outliers(seed: int) -> None:
    draw = np.random.default_rng(seed)
    spikes = LossSpikes(6.0)
    curve = 3 + 6 * np.exp(-np.arange(5000) / 200) + 0.05 * draw.standard_normal(5000)
    assert not any(spikes.observe(float(loss)) for loss in curve)
    assert spikes.observe(float(curve[-1] + 1.0)) and spikes.z is not None and spikes.z > 6
    assert not spikes.observe(float(curve[-1] - 1.0))  # a low loss harms nobody


def test_no_threshold_means_no_outliers() -> None:
    spikes = LossSpikes(None)
    assert not any(spikes.observe(loss) for loss in [1.0] * 100 + [1e6])


def test_after_going_back_bad_steps_are_counted_from_none() -> None:
    table, saved = policy(rewind_after=2), policy()
    saved.at_norm(math.inf, BAD)
    saved.after_step(1, 2.0)
    for step in (2, 3):
        table.at_norm(math.inf, BAD)
        verdict = table.after_step(step, 2.0)
    assert verdict.rewind
    met = table.num_nonfinite
    table.load_state_dict(saved.state_dict())
    table.forget_bad_steps(met)
    assert (table.nonfinite_in_a_row, table.bad_in_a_row, table.first_bad_step, table.num_nonfinite) == (0, 0, None, 2)
