"""The figure ``stability``: its arithmetic, and that each part does what its name says. No test asserts a time."""

from __future__ import annotations

from typing import Any

import pytest

from megastab.report.bench import stability_contestants
from megastab.report.bench.cases import SIZES, Spec
from megastab.report.bench.jobs import Reply
from megastab.report.bench.stability import PARTS, by_part, rows
from megastab.report.bench.stability_contestants import HOST_FUNCTIONS, NUM_CALLS, HostClock, Observed
from tests.ranks import run_ranks

# adamw, fires, looks, step, host_zclip, host_fixed, observe, observe_spikes
ROUNDS = [[0.01, 0.02, 0.005, 0.4, 40e-6, 30e-6, 2e-6, 3e-6], [0.02, 0.01, 0.006, 0.5, 60e-6, 20e-6, 3e-6, 6e-6], [0.01, 0.03, 0.007, 0.6]]
ROUNDS[2] += [50e-6, 10e-6, 4e-6, 9e-6]


def test_rows_of_a_whole_model() -> None:
    found = {row.case: row for row in rows("A", by_part([Reply(seconds) for seconds in ROUNDS]))}
    wanted = {
        "A TVR that rescales every matrix, over AdamW": (2.0, "x", 1.2, "MISSED"),
        "A TVR that rescales none, over AdamW": (0.6, "x", 0.7, "ok"),
        "A TVR, share of the run": (100 * 0.02 / 50 / 0.5, "%", 1.0, "ok"),
        "our functions in a step, ZClip": (50.0, "us", 50.0, "ok"),
        "our functions in a step, fixed clipping": (20.0, "us", 50.0, "ok"),
        "ZClip.observe(), stationary norms": (3.0, "us", 5.0, "ok"),
        "ZClip.observe(), every second one a spike": (6.0, "us", 5.0, "MISSED"),
    }
    assert list(found) == list(wanted)
    for case, (value, unit, bound, verdict) in wanted.items():
        row = found[case]
        assert (row.figure, row.unit, row.bound, row.verdict) == ("stability", unit, bound, verdict), case
        assert row.value == pytest.approx(value), case
    assert "median of pairwise ratios 2.000" in found["A TVR that rescales every matrix, over AdamW"].detail


def test_rows_of_a_model_without_a_whole_step() -> None:
    found = list(rows("B", by_part([Reply(seconds[:3]) for seconds in ROUNDS])))
    assert [row.case[0] for row in found] == ["B", "B"]


class FakeTime:
    """Passes only inside the functions below."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_host_clock_adds_up_the_functions_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime()

    def lasting(seconds: float) -> Any:
        def function(_: object) -> None:
            fake.now += seconds

        return function

    names = ("norm_known", "step_done", "record", "judge")
    controller = type("Controller", (), {name: lasting(10.0**i) for i, name in enumerate(names)})
    monkeypatch.setattr(stability_contestants, "Controller", controller)
    monkeypatch.setattr(stability_contestants, "time", fake)
    clock, one = HostClock(), controller()
    fake.now += 5000.0  # not ours
    for name in names:
        getattr(one, name)()
    assert clock.taken() == 1111.0 and clock.taken() == 0.0
    assert sorted(HOST_FUNCTIONS) == sorted(names)


@pytest.mark.parametrize(("every", "low", "high"), [(2, 0.5, 0.6), (NUM_CALLS, 0.001, 0.05)])
def test_observed_norms_are_spikes_as_often_as_asked(every: int, low: float, high: float) -> None:
    observed = Observed(every)
    assert observed.seconds() > 0.0
    assert observed.zclip.phase == "active" and observed.zclip.num_rewarms == 0
    assert low * NUM_CALLS <= observed.zclip.num_spikes <= high * NUM_CALLS  # a few are spikes by themselves


def rounds(size: str) -> list[tuple[list[float], Any]]:
    """On a rank: two rounds of a small model under the name of a measured one."""
    from megastab.report.bench.stability_contestants import StabilityContestants

    SIZES[size] = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 96, "num_heads": 2, "vocab_size": 128}
    contestants = StabilityContestants(Spec("stability", size))
    master = contestants.beside.adamw.param_groups[0]["params"][0]
    taken = []
    for _ in range(2):
        before = master.detach().clone()
        seconds = contestants.step()["seconds"]
        taken.append((seconds, bool((before != master).any())))
    rules = [type(engine.built.controller.rule).__name__ for engine in contestants.engines]
    norms = [engine.built.controller.norm for engine in contestants.engines]
    return [*taken, (rules, norms)]


@pytest.mark.parametrize(("size", "parts", "rules"), [("A", len(PARTS), ["ZClip", "FixedClip"]), ("B", 3, ["ZClip"])])
def test_a_round_times_every_part(size: str, parts: int, rules: list[str]) -> None:
    """That every firing rescales every matrix, and no look any, is asserted where it is timed."""
    ((*taken, (found, norms)),) = run_ranks(1, rounds, size)
    for seconds, has_changed in taken:
        assert len(seconds) == parts and all(value > 0.0 for value in seconds)
        assert has_changed, "the masters are the engine's own"
        if size == "A":
            step, *hosts = seconds[3:6]
            assert all(host < step for host in hosts)
    assert found == rules
    assert (None in norms) == (size == "B"), "only at model A are steps taken"
