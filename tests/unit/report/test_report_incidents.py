from __future__ import annotations

import math
from pathlib import Path

import pytest

from megastab.report.history import History, read_history
from megastab.report.incidents import Incident, incidents_of, loss_rise, outliers
from megastab.report.rescales import rescaled_matrices
from megastab.stability.record import Event
from tests.unit.report.conftest import RunMaker

TOP = [{"name": "layers.3.q", "share": 0.41}, {"name": "head", "share": None}]


def found(path: Path) -> dict[int, Incident]:
    return {incident.step: incident for incident in incidents_of(read_history(path))}


def test_facts_of_an_event_join_the_record_of_its_step(run: RunMaker) -> None:
    changes = {9: {"action": "clip", "grad_norm": 6.0, "z": 5.0, "clip_threshold": 2.0, "clip_scale": 1 / 3, "reason": "z 5"}}
    facts = {"norm": 6.0, "z": 5.0, "top": TOP, "samples": [64, 71]}
    path = run(changes, events=(Event(9, "clip", "z 5 is above 2.5", facts), Event(9, "loss_spike", "the loss jumped", {"z": 99.0})))
    incident = found(path)[9]
    assert (incident.kinds, incident.action) == (("loss_spike", "clip"), "clip")
    assert incident.reasons == ("z 5 is above 2.5", "the loss jumped")
    assert (incident.norm, incident.z, incident.threshold, incident.scale) == (6.0, 5.0, 2.0, 1 / 3)  # not the z of the loss
    assert incident.top[0] == ("layers.3.q", 0.41) and incident.top[1][0] == "head" and math.isnan(incident.top[1][1])
    assert incident.samples == (64, 71)
    assert incident.losses == (1.0, 8 / 9, 0.8)


def test_an_old_folder_gives_what_its_records_hold(run: RunMaker) -> None:
    changes = {
        5: {"action": "skip", "grad_norm": math.inf, "reason": "the gradient norm is not finite"},
        7: {"action": "clip", "z": 3.0, "reason": "z 3 is above 2.5"},
    }
    by_step = found(run(changes, events=(Event(7, "clip", "z 3 is above 2.5; norm 1.5"),)))
    assert by_step.keys() == {5, 7}
    assert by_step[5].kinds == ("skip",) and not by_step[5].is_finite and math.isnan(by_step[5].norm)
    assert by_step[5].reasons == ("the gradient norm is not finite",)
    assert (by_step[7].z, by_step[7].top, by_step[7].samples) == (3.0, (), None)


def test_a_fixed_cap_at_work_is_no_incident(run: RunMaker) -> None:
    assert found(run({step: {"action": "clip", "clip_scale": 0.5} for step in range(1, 41)})) == {}


def test_an_event_whose_record_was_cut_off_is_told_from_its_facts(run: RunMaker) -> None:
    event = Event(41, "clip", "z 4", {"loss": 2.5, "norm": 7.0, "z": 4.0, "threshold": 3.0, "scale": 3 / 7})
    incident = found(run(events=(event,)))[41]
    assert (incident.norm, incident.z, incident.threshold, incident.action) == (7.0, 4.0, 3.0, "clip")
    assert incident.losses == (None, 2.5, None) and math.isnan(incident.rise)


def test_a_run_has_nothing_before_its_first_step_or_after_its_last(run: RunMaker) -> None:
    by_step = found(run({step: {"action": "skip"} for step in (1, 2, 40)}))
    assert by_step[1].losses == (None, 8.0, 4.0) and by_step[2].losses == (8.0, 4.0, 8 / 3)
    assert by_step[40].losses == (8 / 39, 0.2, None)


def test_a_replay_belongs_to_its_step_and_alone_is_none(run: RunMaker) -> None:
    events = (Event(5, "skip", "not finite"), Event(5, "replay", "layers.1.q on rank 0"), Event(6, "replay", "nothing"))
    by_step = found(run({5: {"action": "skip", "grad_norm": math.inf}}, events=events))
    assert by_step.keys() == {5} and by_step[5].reasons == ("not finite", "layers.1.q on rank 0")


def test_the_worst_comes_first(run: RunMaker) -> None:
    def clip(z: float) -> dict[str, object]:
        return {"action": "clip", "z": z, "loss": 2.0}

    flat = {step: {"loss": 2.0 + 0.01 * (step % 3)} for step in range(1, 41)}
    changes = flat | {
        10: clip(3.0),
        14: clip(9.0),
        18: {"action": "skip", "loss": 2.0},
        22: {"action": "skip", "grad_norm": math.inf, "loss": 2.0, "reason": "overflow: the fp16 loss scale falls"},
        26: {"loss": math.nan},
        30: {"loss": 2.7},
    }
    order = [i.step for i in incidents_of(read_history(run(changes, events=(Event(30, "loss_spike", "jump"),))))]
    assert order == [26, 18, 30, 14, 10, 22]  # not finite, skipped, 40 deviations of loss, z 9, z 3, the loss scaler


def test_without_z_the_larger_excess_is_worse(run: RunMaker) -> None:
    flat = {step: {"loss": 2.0} for step in range(1, 41)}
    changes = flat | {s: {"loss": 2.0, "grad_norm": g, "clip_threshold": 2.0, "action": "clip"} for s, g in ((7, 3.0), (9, 8.0))}
    path = run(changes, events=(Event(7, "clip", "high"), Event(9, "clip", "higher")))
    assert [i.step for i in incidents_of(read_history(path))] == [9, 7]  # too early for deviations of their own


def test_a_run_nobody_watched_is_watched_here(run: RunMaker) -> None:
    flat = {step: {"loss": 2.0 + 0.01 * (step % 3), "grad_norm": 1.0 + 0.1 * (step % 3), "action": "clip"} for step in range(1, 41)}
    flat[20] |= {"grad_norm": 11.0}
    flat[30] |= {"loss": 3.0}
    by_step = found(run(flat))
    assert by_step.keys() == {20, 30}
    assert by_step[20].kinds == ("norm_spike", "clip") and "the norm is " in by_step[20].reasons[0]
    assert by_step[30].kinds == ("loss_spike", "clip") and "the loss is " in by_step[30].reasons[0]


def test_what_a_rule_or_the_policy_watched_is_not_told_twice(run: RunMaker) -> None:
    flat = {step: {"loss": 2.0, "z": 0.0} for step in range(1, 41)}
    flat[20] |= {"grad_norm": 11.0}  # the rule let it pass
    flat[30] |= {"loss": 3.0}
    by_step = found(run(flat, events=(Event(30, "loss_spike", "said the policy"),)))
    assert by_step.keys() == {30} and by_step[30].reasons == ("said the policy",)


def test_a_loss_the_policy_scored_is_not_judged_again() -> None:
    steps = [{"step": i, "loss": 9.0 if i == 30 else 2.0, "loss_z": 1.0, "grad_norm": 1.0} for i in range(40)]
    assert incidents_of(History("run", steps, [], [])) == []
    assert [i.step for i in incidents_of(History("run", [{**s, "loss_z": None} for s in steps], [], []))] == [30]


def test_an_outlier_is_the_first_of_its_kind_and_well_outside() -> None:
    noise = [1.0, 1.05, 1.1] * 7  # median 1.05, deviation 1.4826 x 0.05 = 0.074
    assert outliers([*noise, 3.0, 2.5, 1.0, 2.0], 1e-3).keys() == {21, 24}
    assert outliers([*noise, 1.5], 1e-3) == {} and outliers([*noise, 1.6], 1e-3).keys() == {21}
    assert outliers([*noise, 1.6], 0.1) == {}  # the floor
    assert outliers([1.0] * 9 + [5.0], 1e-3) == {} and outliers([1.0] * 10 + [5.0], 1e-3).keys() == {10}
    assert outliers([*noise, math.nan, math.inf, 1.0], 1e-3) == {}


def test_the_rise_is_over_the_median_in_robust_deviations() -> None:
    losses = [2.0, 2.1] * 10 + [2.05, 2.55, 2.3]
    rise, sigmas = loss_rise(losses, 20)
    assert rise == pytest.approx(0.5) and sigmas == pytest.approx(0.5 / (1.4826 * 0.05))  # the step after counts, half the gap is the MAD
    assert loss_rise(losses[:21], 20)[0] == pytest.approx(0.0)
    assert loss_rise([*losses[:21], math.nan], 20) == (math.inf, math.inf)
    assert math.isnan(loss_rise(losses, 4)[0]) and not math.isnan(loss_rise(losses, 5)[0])
    assert loss_rise([2.0] * 20 + [2.1], 20)[1] == pytest.approx(0.1 / 2e-3)  # equal losses: a floor, no division by zero


def test_facts_that_are_no_facts_are_left_out(run: RunMaker) -> None:
    events = (
        Event(5, "skip", "x", {"top": "q", "samples": [1]}),
        Event(6, "skip", "x", {"top": [3, {"share": 1.0}, {"name": "q", "share": "high"}], "samples": ["a", "b"]}),
    )
    by_step = found(run({5: {"z": "many"}}, events=events))
    assert by_step[5].top == () and by_step[5].samples is None and math.isnan(by_step[5].z)
    assert [name for name, _ in by_step[6].top] == ["q"] and math.isnan(by_step[6].top[0][1]) and by_step[6].samples is None


def test_rescales_are_summed_by_matrix(run: RunMaker) -> None:
    facts = [("layers.0.up", 0.0125), ("layers.1.q", 0.0102), ("layers.0.up", 0.02), ("head", 0.1)]
    new = tuple(Event(10 * i, "rescale", "x", {"name": n, "std": s, "target": 0.01}) for i, (n, s) in enumerate(facts, start=1))
    old = (Event(40, "rescale", "layers.1.q: std 0.0105 over its target 0.01, mean 1.2e-05"), Event(40, "rescale", "no more is known"))
    first, second, third, last = rescaled_matrices(read_history(run(events=new + old)))
    assert (first.name, first.times, first.first_step, first.last_step) == ("layers.0.up", 2, 10, 30)
    assert first.smallest_factor == pytest.approx(0.5)
    assert (second.name, second.times) == ("layers.1.q", 2) and second.smallest_factor == pytest.approx(0.01 / 0.0105)
    assert (third.name, third.times) == ("head", 1)  # harder than the others, and only once
    assert last.name == "?" and math.isnan(last.smallest_factor)


def test_what_was_taken_back_is_no_incident(run: RunMaker) -> None:
    undone = Event(5, "skip", "not finite", {"samples": [40, 47], "undone": True})
    history = read_history(run(events=(undone, Event(6, "rewind", "two bad steps"), Event(6, "rewind", "two more"))))
    assert incidents_of(history) == [] and [event["step"] for event in history.undone] == [5]
    assert "2 rewinds" in history.summary()


def test_a_batch_with_a_gap_says_what_it_leaves_out(run: RunMaker) -> None:
    event = Event(5, "skip", "not finite", {"samples": [40, 60], "left_out": [[44, 50], [52, "x"], [55, 57]]})
    (incident,) = incidents_of(read_history(run({5: {"action": "skip"}}, events=(event,))))
    assert incident.samples == (40, 60) and incident.left_out == ((44, 50), (55, 57))
