"""Who is slow: the verdict on tables of ranks and steps, what is told of it and how often, and windows of this rank's own seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.config.schema_telemetry import StragglerConfig, TelemetryConfig
from megastab.parallel.waiting import HostClock, Waiting
from megastab.stability.record import Event
from megastab.telemetry.rank_times import RankTimes
from megastab.telemetry.straggler import Pace, Peer, Straggler, Window, medians, paces, slowest_first
from tests.layouts import SINGLE, config_of

STEPS = 50


def table(ranks: int, seconds: float = 1.0, noise: float = 0.05) -> np.ndarray:
    """Own seconds [ranks, steps] with noise."""
    return seconds * (1 + noise * np.random.default_rng(ranks).standard_normal((ranks, STEPS)))


def judged(own: np.ndarray, data: np.ndarray | None = None, stages: Sequence[int] | None = None) -> list[Pace]:
    fetching = np.full_like(own, 0.01) if data is None else data
    rows = [medians(list(of_own), list(of_data)) for of_own, of_data in zip(own, fetching, strict=True)]
    return paces([row[0] for row in rows], [row[1] for row in rows], [0] * len(own) if stages is None else stages)


def slow(found: list[Pace]) -> list[int]:
    return [pace.rank for pace in slowest_first(found, 0.2)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 512])
@pytest.mark.parametrize("factor", [1.1, 1.4])
def test_a_rank_is_slow_from_the_share_on(ranks: int, factor: float) -> None:
    own = table(ranks, noise=0.01)
    own[ranks - 1] *= factor
    assert slow(judged(own)) == ([ranks - 1] if factor > 1.2 else [])


def test_the_limit_itself_is_slow() -> None:
    found = judged(np.outer([4.0, 5.0], np.ones(STEPS)))
    assert [pace.rank for pace in slowest_first(found, 0.25)] == [1] and slowest_first(found, 0.2500001) == []


def test_one_slow_step_is_not_a_slow_rank_and_most_of_them_are() -> None:
    own = table(4)
    own[2, 7] = 1000.0
    own[1, : STEPS // 2 - 1] *= 2
    assert slow(judged(own)) == []
    own[1, : STEPS // 2 + 1] *= 2
    assert slow(judged(own)) == [1]


def test_a_rank_is_measured_by_its_own_stage() -> None:
    own = np.outer([1.0, 1.0, 3.0, 3.9, 0.5], np.ones(STEPS))
    found = judged(own, stages=[0, 0, 1, 1, 2])
    assert slow(found) == [3] and found[3].ratio == pytest.approx(1.3)
    assert [pace.rank for pace in found] == [0, 1, 2, 3], "the one alone in its stage has no peers"


def test_half_of_the_ranks_slow_are_slow_all_the_same() -> None:
    assert slow(judged(np.outer([1.0, 1.0, 1.5, 1.6], np.ones(STEPS)))) == [3, 2]


@pytest.mark.parametrize(("extra_data", "extra_rest", "cause"), [(0.5, 0.0, "data"), (0.0, 0.5, "computing"), (0.3, 0.2, "data")])
def test_what_is_slow_is_what_makes_the_difference(extra_data: float, extra_rest: float, cause: str) -> None:
    own, data = np.ones((3, STEPS)), np.full((3, STEPS), 0.4)
    own[1] += extra_data + extra_rest
    data[1] += extra_data
    assert judged(own, data)[1].cause == cause
    assert judged(own, np.full_like(own, math.nan))[1].cause == "", "a foreign loop does not tell"


def straggler(ranks: int, over: float = 0.2, stages: int = 1) -> Straggler:
    return Straggler(StragglerConfig(over=over), [Peer(f"node{rank // 2}", rank * stages // ranks) for rank in range(ranks)])


def told(judge: Straggler, *windows: Sequence[float]) -> list[Event]:
    stages = [peer.stage for peer in judge.peers]
    return [e for step, own in enumerate(windows) for e in judge.judge(step, STEPS, paces(own, [0.01] * len(own), stages))]


def test_a_slow_rank_is_told_once_and_when_it_is_over() -> None:
    events = told(straggler(4), [1, 1, 1, 1.3], [1, 1, 1, 1.4], [1, 1, 1, 1.15], [1, 1, 1, 1.05], [1, 1, 1, 1])
    assert [(event.step, event.facts["is_over"]) for event in events] == [(0, False), (3, True)]
    assert events[0].kind == events[1].kind == "straggler" and events[1].facts["ranks"] == [3]
    said = "rank 3 on node1 needs 1.3 times what its peers need: 1.3 s of its own a step against 1 s (medians of 50 steps)"
    assert events[0].reason == f"{said}; it is slow at computing, not at fetching data"
    assert json.loads(json.dumps(events[0].to_json()))["host"] == "node1"


def test_another_rank_in_its_place_is_told_and_two_in_turns_are_not() -> None:
    events = told(straggler(4), [1, 1, 1, 1.3], [1, 1, 1.5, 1], [1, 1, 1, 1])
    assert [event.facts.get("rank") for event in events] == [3, 2, None]
    events = told(straggler(6), [1, 1, 1, 1, 1.3, 1.4], [1, 1, 1, 1, 1.4, 1.3], [1, 1, 1, 1, 1.3, 1.4])
    assert [(event.facts["rank"], event.facts["also"]) for event in events] == [(5, [4])]
    assert events[0].reason.endswith("; slow as well: rank 4")


def test_a_stage_is_named_where_there_are_several() -> None:
    assert told(straggler(4, stages=2), [1, 1, 3, 9])[0].reason.startswith("rank 3 on node1 (stage 1) needs 3 times")


def test_many_slow_ranks_are_not_all_listed() -> None:
    (event,) = told(straggler(64), [1.0] * 40 + [2.0] * 24)
    assert event.reason.endswith("ranks 41, 42, 43, 44, 45, 46, 47, 48 and 15 more") and len(event.facts["also"]) == 23


def test_a_window_says_what_is_known() -> None:
    window = Window(100, STEPS, [1.00004, 2.0, math.nan], [0.1, math.nan, 0.1], [0, 0, 1], 0.2)
    assert json.loads(json.dumps(window.to_json())) == {
        "step": 100, "steps": STEPS, "over": 0.2, "own_seconds": [1.0, 2.0, None], "data_seconds": [0.1, None, 0.1], "stages": [0, 0, 1],
    }  # fmt: skip
    assert window.scalars() == {"own_seconds": 1.00004, "slowest_over_median": pytest.approx(2.0, rel=1e-4)}
    assert "slowest_over_median" not in Window(1, 3, [1.0, 1.0], [0.1] * 2, [0, 1]).scalars(), "nobody has peers"


class Lagging(HostClock):
    """Tells a step's waits one step late."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def seconds(self, spans: Any) -> Any:
        if not any(spans is each for each in self.asked):
            self.asked.append(spans)
            return None
        return 0.25


def test_windows_count_steps_and_begin_anew_after_a_restart() -> None:
    times = RankTimes(StragglerConfig(steps=3), Waiting(HostClock()), [Peer("here", 0)])
    for step, seconds in enumerate([1.0, 2.0, 3.0, 7.0, 8.0], 1):
        times.begin()
        times.end(seconds, seconds / 10)
        window = times.window(step)
        assert (window is not None) == (step == 3)
    assert times.last is not None and (times.last.step, times.last.own, times.last.data) == (3, [2.0], [0.2])
    times.straggler.told = [0]
    times.restart()
    for step in (6, 7, 8):
        assert times.window(step) is None and times.straggler.told == []
        times.begin()
        times.end(5.0)
    assert times.window(8) is not None and times.last.own == [5.0]


def test_a_step_that_is_not_known_yet_counts_in_the_next_window() -> None:
    times = RankTimes(StragglerConfig(steps=3), Waiting(Lagging()), [Peer("here", 0)])
    windows = []
    for step in range(1, 7):
        times.begin()
        times.end(float(step))
        windows.append(times.window(step))
    assert [window.own for window in windows if window is not None] == [[1.25], [3.75]], "of steps 1 and 2; 3, 4 and 5; less the wait"


def test_windows_begin_anew_where_the_run_goes_on_from_elsewhere() -> None:
    """A resume, a rewind to a checkpoint and one to a copy in memory all stand at a manifest."""
    from megastab.engine.trainer import Trainer

    times = RankTimes(StragglerConfig(steps=3), Waiting(HostClock()), [Peer("here", 0)])
    for _ in range(2):
        times.begin()
        times.end(1.0)
    trainer: Any = SimpleNamespace(data=SimpleNamespace(train=SimpleNamespace()), snapshots=SimpleNamespace(forget_after=lambda _: None))
    trainer.rank_times = times
    Trainer._stand_at(trainer, SimpleNamespace(step=40, consumed=400))  # type: ignore[arg-type]
    times.begin()
    times.end(1.0)
    assert times.window(41) is None, "the third step, but the first since"


@pytest.mark.parametrize(("key", "value"), [("steps", 2), ("steps", 5.5), ("over", 0), ("over", -1), ("ovr", 0.3)])
def test_a_bad_setting_is_named(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"megastab.telemetry.straggler.{key}"):
        load_config(config_of(SINGLE, telemetry__straggler={key: value}))


def test_it_is_on_unless_switched_off() -> None:
    assert TelemetryConfig().straggler == StragglerConfig(steps=50, over=0.2)
    assert load_config(config_of(SINGLE, telemetry={"straggler": None})).megastab.telemetry.straggler is None
