"""The JSON's cap as a decision, and the record of a step."""

from __future__ import annotations

import inspect
import json
import math

import pytest

from megastab.config.errors import UserError
from megastab.config.schema import TVRConfig, ZClipConfig
from megastab.parallel.grid import Grid
from megastab.stability.controller import Controller, FixedClip
from megastab.stability.record import Event, StepRecord
from megastab.stability.tvr import TVR
from megastab.stability.zclip import ZClip


class Norms:
    """An adapter that only tells norms and remembers what it was told to do."""

    recovers = False

    def __init__(self) -> None:
        self.done: list[object] = []

    def on_norm(self, listener) -> None:
        self.tell = listener

    def after_update(self, edit) -> None:
        self.edit = edit

    def parameters(self) -> list[object]:
        return []

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
    adapter, rule = Norms(), ZClip(warmup_steps=2, max_nonfinite_in_a_row=1)
    controller = Controller(adapter, Grid(), rule)
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
    assert "clipping was ZClip, is FixedClip" in Controller(Norms(), Grid(), FixedClip(1.0)).load_state_dict(state)[0]


def test_defaults_of_the_schema_are_those_of_the_methods() -> None:
    for method, section in ((ZClip, ZClipConfig), (TVR, TVRConfig)):
        signature = inspect.signature(method).parameters
        for name, field in section.model_fields.items():
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
