"""One rule for each matrix or block: who is clipped, what it amounts to, and that a state survives."""

from __future__ import annotations

import json
import math

import pytest

from megastab.stability.rivals import AdaGC
from megastab.stability.scoped import Scoped
from megastab.stability.zclip import ZClip

LAYERS = {"embedding": None, "layers.0.q": 0, "layers.0.k": 0, "layers.1.q": 1}
QUIET = {"embedding": 3.0, "layers.0.q": 1.0, "layers.0.k": 2.0, "layers.1.q": 0.5}


def total(norms: dict[str, float]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def warmed(scope: str) -> Scoped:
    rule = Scoped(lambda: ZClip(warmup_steps=4), scope, LAYERS)  # type: ignore[arg-type]
    for step in range(12):
        norms = {name: norm * (1 + 0.05 * (-1) ** step) for name, norm in QUIET.items()}
        decision, factors = rule.observe(total(norms), norms)
        assert decision.action == "apply" and not factors
    return rule


def test_only_the_matrix_that_spikes_is_clipped() -> None:
    rule, single = warmed("parameter"), ZClip(warmup_steps=4)
    for step in range(12):
        single.observe(1.0 * (1 + 0.05 * (-1) ** step))
    norms = {**QUIET, "layers.0.q": 50.0}
    decision, factors = rule.observe(total(norms), norms)
    assert factors == {"layers.0.q": single.observe(50.0).scale}
    after = {name: norm * factors.get(name, 1.0) for name, norm in norms.items()}
    assert decision.threshold == pytest.approx(total(after)) and decision.scale == pytest.approx(total(after) / total(norms))
    assert decision.action == "clip" and "layers.0.q" in decision.reason and "1 of 4" in decision.reason


def test_a_block_is_clipped_whole_and_nothing_else() -> None:
    norms = {**QUIET, "layers.0.q": 50.0}
    decision, factors = warmed("layer").observe(total(norms), norms)
    assert factors.keys() == {"layers.0.q", "layers.0.k"} and len(set(factors.values())) == 1
    assert decision.action == "clip" and "layers.0" in decision.reason


def test_a_norm_that_is_not_finite_skips_and_teaches_nothing() -> None:
    rule = warmed("parameter")
    before = json.dumps(rule.state_dict())
    decision, factors = rule.observe(math.inf, {**QUIET, "layers.0.q": math.inf})
    assert decision.action == "skip" and not factors and json.dumps(rule.state_dict()) == before


def test_a_matrix_without_gradient_is_left_alone() -> None:
    norms = {**QUIET, "layers.1.q": 0.0}
    decision, factors = warmed("parameter").observe(total(norms), norms)
    assert decision.action == "apply" and not factors


def test_adagc_warms_up_on_the_global_norm() -> None:
    rule = Scoped(lambda: AdaGC(warmup_steps=2), "parameter", LAYERS)
    norm = total(QUIET)
    decision, factors = rule.observe(norm, QUIET)
    assert factors == pytest.approx(dict.fromkeys(QUIET, 1 / norm)) and decision.scale == pytest.approx(1 / norm)
    assert decision.reason == ""  # clipping is its everyday business


def test_state_goes_on_as_if_never_interrupted() -> None:
    first, second = warmed("parameter"), Scoped(lambda: ZClip(warmup_steps=4), "parameter", LAYERS)
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict()))) == []
    norms = {**QUIET, "layers.0.q": 50.0}
    assert first.observe(total(norms), norms) == second.observe(total(norms), norms)
    with pytest.raises(ValueError, match="ZClip by layer, but of 'ZClip by parameter'"):
        warmed("layer").load_state_dict(first.state_dict())
