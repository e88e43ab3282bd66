"""ZClip's state: a run goes on as if never interrupted, and notices when it goes on differently."""

from __future__ import annotations

import json
import math
import random
import warnings
from typing import Any

import pytest

from megastab.stability.rivals import AutoClip
from megastab.stability.zclip import ZClip


def norms(count: int = 260) -> list[float]:
    """Every kind of step: spikes, a shift that restarts the statistics, a NaN, a zero."""
    draw = random.Random(1)
    stream = [draw.gauss(1.0, 0.05) * (3.0 if t >= 100 else 1.0) * (8.0 if t % 17 == 16 else 1.0) for t in range(count)]
    stream[12] = stream[70] = stream[110] = math.nan
    stream[13] = stream[71] = 0.0
    return stream


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"compat": True}, {"mode": "mean", "max_grad_norm": 2.0}, {"skip_update_on_spike": True, "variance": "west"}],
    ids=str,
)
@pytest.mark.parametrize("when", [0, 1, 10, 13, 24, 25, 26, 27, 60, 111, 118, 119, 120, 121, 122, 200])
def test_resume_at_any_step_changes_nothing(when: int, kwargs: dict[str, Any]) -> None:
    stream = norms()
    whole, first, second = ZClip(**kwargs), ZClip(**kwargs), ZClip(**kwargs)
    expected = [whole.observe(norm) for norm in stream]
    got = [first.observe(norm) for norm in stream[:when]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert second.load_state_dict(through_json(first.state_dict())) == []
    got += [second.observe(norm) for norm in stream[when:]]
    assert repr(got) == repr(expected) and second.state_dict() == whole.state_dict()


def test_an_announcement_survives_a_save() -> None:
    rule, resumed = ZClip(), ZClip()
    rule.notify_regime_change("new data")
    resumed.load_state_dict(through_json(rule.state_dict()))
    assert resumed.observe(1.0).reason == "ZClip warms up anew: new data" and resumed.phase == "rewarm"


def test_a_state_is_a_copy() -> None:
    rule = ZClip()
    rule.observe(1.0)
    state = rule.state_dict()
    other = ZClip()
    other.load_state_dict(state)
    rule.observe(2.0)
    other.observe(3.0)
    assert state["buffer"] == [1.0] and rule.buffer == [1.0, 2.0] and other.buffer == [1.0, 3.0]


def active(**kwargs: Any) -> dict[str, Any]:
    rule = ZClip(**kwargs)
    for norm in norms()[:60]:
        rule.observe(norm)
    return rule.state_dict()


@pytest.mark.parametrize(
    ("saved", "now", "phase", "said"),
    [
        ({}, {"alpha": 0.9}, "active", "alpha 0.97 -> 0.9): the statistics are kept"),
        ({}, {"alpha": 0.9, "on_change": "rewarm"}, "rewarm", "collected anew"),
        ({}, {"mode": "max", "z_thresh": 3.0}, "active", "z_thresh 2.5 -> 3.0; mode reciprocal -> max"),
        ({"batch_size": 256}, {"batch_size": 512}, "rewarm", "batch_size 256 -> 512): the statistics are collected anew"),
        ({"batch_size": 256}, {"batch_size": 512, "on_change": "keep"}, "active", "the statistics are kept"),
        ({"compat": True}, {}, "rewarm", "compat True -> False"),
        ({}, {"max_grad_norm": 5.0, "cap_statistics": True}, "rewarm", "collected anew"),
        ({}, {"max_grad_norm": 5.0}, "active", "max_grad_norm None -> 5.0"),
    ],
)
def test_other_settings_are_noticed(saved: dict[str, Any], now: dict[str, Any], phase: str, said: str) -> None:
    rule = ZClip(**now)
    with pytest.warns(UserWarning) as told:
        changes = rule.load_state_dict(active(**saved))
    assert said in str(told[0].message) and rule.phase == phase and changes
    decision = rule.observe(1.0)
    assert ("resumed with " + changes[0] in decision.reason) == (phase == "rewarm")


@pytest.mark.parametrize(("saved", "now"), [({}, {"batch_size": 512}), ({"batch_size": 512}, {}), ({}, {"max_nonfinite_in_a_row": None})])
def test_what_is_unknown_or_beside_the_point_is_no_change(saved: dict[str, Any], now: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ZClip(**now).load_state_dict(active(**saved)) == []


def test_a_shorter_warmup_ends_at_once_and_a_smaller_window_keeps_the_newest() -> None:
    rule = ZClip()
    for _ in range(15):
        rule.observe(1.0)
    shorter = ZClip(warmup_steps=10)
    with pytest.warns(UserWarning):
        shorter.load_state_dict(rule.state_dict())
    shorter.observe(1.0)
    assert shorter.phase == "active"
    state = active() | {"spike_times": [40, 50, 55], "spike_norms": [8.0, 8.1, 8.2]}
    smaller = ZClip(rewarm_clipped=2)
    with pytest.warns(UserWarning):
        smaller.load_state_dict(state)
    assert list(smaller.spike_times) == [50, 55] and list(smaller.spike_norms) == [8.1, 8.2]


def test_released_statistics_at_zero_cannot_be_kept() -> None:
    zeros = ZClip(compat=True)
    for _ in range(30):
        zeros.observe(0.0)
    rule = ZClip(on_change="keep")
    with pytest.warns(UserWarning, match="collected anew"):
        rule.load_state_dict(zeros.state_dict())
    assert rule.observe(1.0).action == "apply"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (AutoClip().state_dict(), "not the state of ZClip, version 1, but of rule 'AutoClip', version 1"),
        ({}, "but of rule None"),
        (ZClip().state_dict() | {"version": 2}, "version 2"),
        ({key: value for key, value in ZClip().state_dict().items() if key not in ("var", "note")}, "lacks var, note"),
    ],
)
def test_a_foreign_state_is_refused_whole(state: dict[str, Any], said: str) -> None:
    rule = ZClip()
    rule.observe(1.0)
    before = rule.state_dict()
    with pytest.raises(ValueError) as refusal:
        rule.load_state_dict(state)
    assert said in str(refusal.value) and rule.state_dict() == before
