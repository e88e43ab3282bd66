"""The JSON's cap as a decision, and the record of a step."""

from __future__ import annotations

import json
import math

import pytest

from megastab.stability.controller import Controller, FixedClip
from megastab.stability.record import Event, StepRecord


class Norms:
    """An adapter that only tells norms."""

    cap = 2.0

    def on_norm(self, listener) -> None:
        self.tell = listener


@pytest.mark.parametrize(
    ("cap", "norm", "scale", "action"),
    [(0.0, 5.0, 1.0, "apply"), (2.0, 1.0, 1.0, "apply"), (2.0, 8.0, 2 / 8.000001, "clip"), (2.0, 0.0, 1.0, "apply")],
)
def test_cap_scales_what_is_above_it(cap: float, norm: float, scale: float, action: str) -> None:
    decision = FixedClip(cap).observe(norm)
    assert decision.scale == pytest.approx(scale) and decision.action == action and decision.norm == norm
    assert decision.threshold == (cap or None) and decision.reason == ""


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("cap", [0.0, 1.0])
def test_what_is_not_finite_is_skipped_with_a_reason(cap: float, norm: float) -> None:
    decision = FixedClip(cap).observe(norm)
    assert decision.action == "skip" and decision.scale == 0.0 and "not finite" in decision.reason


def test_controller_keeps_the_last_decision() -> None:
    adapter = Norms()
    controller = Controller(adapter)
    assert controller.decision is None
    adapter.tell(1.0)
    adapter.tell(4.0)
    assert controller.decision.norm == 4.0 and controller.decision.threshold == 2.0 and controller.decision.action == "clip"


def test_record_becomes_plain_json() -> None:
    record = StepRecord(3, math.nan, 1e-3, math.inf, None, 0.0, None, "skip", "why", 0, 128, 0.5)
    text = json.dumps(record.to_json(), allow_nan=False)
    assert json.loads(text) == {
        "step": 3, "loss": None, "lr": 1e-3, "grad_norm": None, "clip_threshold": None, "clip_scale": 0.0, "z": None, "action": "skip",
        "reason": "why", "rescaled": 0, "tokens": 128, "seconds": 0.5,
    }  # fmt: skip
    assert Event(1, "save", "there").to_json() == {"step": 1, "kind": "save", "reason": "there"}
