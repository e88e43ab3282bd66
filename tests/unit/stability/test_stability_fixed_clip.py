"""The JSON's cap as a decision, and the record of a step."""

from __future__ import annotations

import inspect
import json
import math

import pytest

from megastab.config.errors import UserError
from megastab.config.schema_stability import AdaGCConfig, AutoClipConfig, PolicyConfig, SkipStepConfig, TVRConfig, ZClipConfig
from megastab.parallel.grid import Grid
from megastab.stability.clip_rule import ClipDecision
from megastab.stability.controller import Controller
from megastab.stability.fixed_clip import FixedClip, capped
from megastab.stability.policy import Policy
from megastab.stability.record import Event, StepRecord
from megastab.stability.rivals import AdaGC, AutoClip, SkipStep
from megastab.stability.tvr import TVR
from megastab.stability.zclip import ZClip


class Norms:
    """An adapter that only tells norms and remembers what it was told to do."""

    recovers = False
    cap = 0.0

    def __init__(self) -> None:
        self.done: list[object] = []

    def on_norm(self, listener) -> None:
        self.tell = listener

    def after_update(self, edit) -> None:
        self.edit = edit

    def parameters(self) -> list[object]:
        return []

    def reduced_gradients(self):
        return iter(())

    def info(self, parameter):
        raise AssertionError("there are no parameters")

    def scaler_recovers(self) -> bool:
        return self.recovers

    def set_scale(self, scale: float) -> None:
        self.done.append(scale)

    def skip(self) -> None:
        self.done.append("skip")


@pytest.mark.parametrize(
    ("cap", "norm", "scale", "action"),
    [(0.0, 5.0, 1.0, "apply"), (2.0, 1.0, 1.0, "apply"), (2.0, 8.0, 2 / 8.000001, "clip"), (2.0, 0.0, 1.0, "apply")],
)
def test_cap_scales_what_is_above_it(cap: float, norm: float, scale: float, action: str) -> None:
    decision = FixedClip(cap).observe(norm)
    assert decision.scale == pytest.approx(scale) and decision.action == action
    assert decision.threshold == (cap or None) and decision.reason == ""


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_what_is_not_finite_is_skipped_with_a_reason(cap: float, norm: float) -> None:
    decision = FixedClip(cap).observe(norm)
    assert decision.action == "skip" and decision.scale == 0.0 and "not finite" in decision.reason


def test_controller_keeps_the_last_decision() -> None:
    adapter = Norms()
    controller = Controller(adapter, Grid(), FixedClip(2.0))
    assert controller.decision is None
    adapter.tell(1.0)
    adapter.tell(4.0)
    assert controller.norm == 4.0 and controller.decision.threshold == 2.0 and controller.decision.action == "clip"


def test_controller_scales_or_skips() -> None:
    adapter = Norms()
    Controller(adapter, Grid(), FixedClip(2.0))
    for norm in (1.0, 4.0, math.inf):
        adapter.tell(norm)
    assert adapter.done == [1.0, pytest.approx(2 / 4.000001), "skip"]
    assert adapter.edit() is False  # without TVR nothing is ever edited


def test_overflow_of_the_loss_scale_is_nobodys_spike() -> None:
    adapter, rule = Norms(), ZClip(warmup_steps=2)
    controller = Controller(adapter, Grid(), rule, policy=Policy(PolicyConfig(max_nonfinite_in_a_row=1)))
    adapter.recovers = True
    for _ in range(5):
        adapter.tell(math.inf)
    assert controller.decision is not None and controller.decision.reason.startswith("overflow") and rule.num_nonfinite == 0
    adapter.recovers = False
    adapter.tell(math.inf)
    with pytest.raises(UserError, match="training stopped: 2 steps in a row"):
        adapter.tell(math.inf)


def test_state_survives_and_a_change_of_rule_is_told() -> None:
    first = Controller(Norms(), Grid(), ZClip(warmup_steps=2), TVR(interval_steps=3))
    for norm in (1.0, 1.1, 1.2):
        first.adapter.tell(norm)
    first.tvr.advance()
    state = json.loads(json.dumps(first.state_dict()))
    second = Controller(Norms(), Grid(), ZClip(warmup_steps=2), TVR(interval_steps=3))
    assert second.load_state_dict(state) == [] and second.state_dict() == first.state_dict()
    assert "clipping was ZClip, is fixed: it has no statistics" in Controller(Norms(), Grid(), FixedClip(1.0)).load_state_dict(state)[0]


@pytest.mark.parametrize(("norm", "scale", "threshold"), [(1.0, 1.0, None), (3.0, 1.0, None), (8.0, 0.5, 4.0), (0.0, 1.0, None)])
def test_a_cap_over_a_rule_that_does_not_know_it(norm: float, scale: float, threshold: float | None) -> None:
    decision = capped(ClipDecision(None, 1.0, 2.0, "apply"), norm, 4.0)
    assert (decision.scale, decision.threshold, decision.z) == (pytest.approx(scale, rel=1e-6), threshold, 2.0)
    assert decision.action == ("clip" if scale < 1 else "apply") and decision.scale == FixedClip(4.0).observe(norm).scale


def test_a_cap_leaves_a_skip_and_a_harder_clip_alone() -> None:
    for decision in (ClipDecision(None, 0.0, None, "skip", "why"), ClipDecision(1.0, 0.1, None, "clip")):
        assert capped(decision, 10.0, 4.0) is decision
    assert capped(ClipDecision(None, 1.0, None, "apply"), 1e9, 0.0).scale == 1.0


def test_a_cap_that_leaves_zclip_nothing_to_do_is_told_once() -> None:
    adapter = Norms()
    adapter.cap = 1.0
    controller = Controller(adapter, Grid(), ZClip(warmup_steps=2, max_grad_norm=1.0))
    told = []
    with pytest.warns(UserWarning, match="below the usual norm"):
        for step in range(250):
            adapter.tell(3.0 + 0.01 * (step % 7))
            told.append(controller.warning)
    assert sum(map(bool, told)) == 1 and "gradient_clipping 1 decided 100 of the last 100 steps" in told[99]
    quiet = Norms()
    quiet.cap = 50.0
    controller = Controller(quiet, Grid(), ZClip(warmup_steps=2, max_grad_norm=50.0))
    for step in range(250):
        quiet.tell(3.0 + 0.01 * (step % 7))
        assert controller.warning == ""


def test_a_fixed_cap_leaves_a_word_about_a_spike() -> None:
    adapter = Norms()
    controller = Controller(adapter, Grid(), FixedClip(1.0))
    told = []
    for step in range(60):
        adapter.tell(50.0 if step == 40 else 3.0 + 0.1 * (step % 3))
        told.append(controller.norm_spike)
    assert [i for i, said in enumerate(told) if said] == [40] and "norm 50 is" in told[40]
    assert all(done == pytest.approx(1 / 3, rel=0.1) for i, done in enumerate(adapter.done) if i != 40)  # decides nothing
    again = Controller(Norms(), Grid(), FixedClip(1.0))
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    again.adapter.tell(50.0)
    assert again.norm_spike  # warmed up already
    silent = Controller(Norms(), Grid(), FixedClip(1.0), policy=Policy(PolicyConfig(norm_spike=None)))
    for step in range(60):
        silent.adapter.tell(50.0 if step == 40 else 3.0)
        assert not silent.norm_spike


def test_clip_rate_follows_what_is_done() -> None:
    adapter = Norms()
    controller = Controller(adapter, Grid(), FixedClip(2.0))
    for _ in range(200):
        adapter.tell(4.0)
    assert controller.scalars() == {"clip_rate": pytest.approx(1.0, abs=0.01), "clipped_norm": pytest.approx(2.0, rel=1e-6)}
    for _ in range(200):
        adapter.tell(1.0)
    assert controller.scalars() == {"clip_rate": pytest.approx(0.0, abs=0.01), "clipped_norm": 1.0}
    adapter.tell(math.inf)
    assert "clipped_norm" not in controller.scalars()


def test_a_rehearsed_step_decides_and_learns_nothing() -> None:
    adapter, rule = Norms(), ZClip(warmup_steps=2)
    controller = Controller(adapter, Grid(), rule)
    adapter.tell(1.0)
    before = json.dumps(controller.state_dict())
    with controller.rehearsal() as norms:
        adapter.tell(math.inf)
        adapter.tell(5.0)
    assert norms == [math.inf, 5.0] and json.dumps(controller.state_dict()) == before
    assert adapter.done == [1.0, "skip", "skip"] and controller.norm == 1.0


def test_skip_step_is_told_the_loss() -> None:
    adapter, rule = Norms(), SkipStep(rolling_interval_length=8)
    controller, losses = Controller(adapter, Grid(), rule), iter([2.0, 2.1, 2.0, 2.1, 2.0, 2.1, 50.0])
    controller.read_loss = lambda: next(losses)
    for step in range(7):
        adapter.tell(1.0 + 0.01 * (step % 2))
    assert controller.decision is not None and controller.decision.action == "skip" and "loss" in controller.decision.reason


def test_defaults_of_the_schema_are_those_of_the_methods() -> None:
    pairs = ((ZClip, ZClipConfig), (TVR, TVRConfig), (AutoClip, AutoClipConfig), (AdaGC, AdaGCConfig), (SkipStep, SkipStepConfig))
    for method, section in pairs:
        signature = inspect.signature(method).parameters
        for name, field in section.model_fields.items():
            if name == "scope":
                continue  # decides how many there are
            mine, theirs = field.default, signature[name].default
            assert mine == (theirs if not callable(theirs) else theirs()) or (not mine and name in ("exclude", "targets")), name


def test_record_becomes_plain_json() -> None:
    record = StepRecord(3, math.nan, 1e-3, math.inf, None, 0.0, None, "skip", "why", 0, 128, 0.5)
    text = json.dumps(record.to_json(), allow_nan=False)
    assert json.loads(text) == {
        "step": 3, "loss": None, "lr": 1e-3, "grad_norm": None, "clip_threshold": None, "clip_scale": 0.0, "z": None, "action": "skip",
        "reason": "why", "rescaled": 0, "tokens": 128, "seconds": 0.5,
    }  # fmt: skip
    assert Event(1, "save", "there").to_json() == {"step": 1, "kind": "save", "reason": "there"}
