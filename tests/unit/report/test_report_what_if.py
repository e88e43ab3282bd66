"""What another rule would have decided about a run's norms."""

from __future__ import annotations

import math

import pytest

from megastab.config.errors import UserError
from megastab.report.history import History
from megastab.report.what_if import answer, decisions, question
from megastab.stability.zclip import ZClip

NORMS = [1.0 + 0.02 * (-1) ** step for step in range(60)]
NORMS[40] = 9.0


def run(norms: list[float | None], reasons: dict[int, str] | None = None) -> History:
    told = reasons or {}
    steps = [{"step": i + 1, "loss": 2.0, "grad_norm": norm, "action": "apply", "reason": told.get(i, "")} for i, norm in enumerate(norms)]
    return History("run", steps, [], [])


def test_the_decisions_are_the_rules_own() -> None:
    rule = ZClip()
    assert [d.scale for d in decisions(run(NORMS), question('{"zclip": {}}'))] == [rule.observe(norm).scale for norm in NORMS]
    said = answer(run(NORMS), question('{"zclip": {}}'))
    assert "clipped 1 (1.7 %); the run clipped 0" in said and "hardest: 41 (x" in said and "skipped 0" in said


def test_a_fixed_cap_and_a_cap_over_a_rule() -> None:
    assert "clipped 30" in answer(run(NORMS), question('{"gradient_clipping": 1.0}'))
    capped = decisions(run(NORMS), question('{"skip_step": {"rolling_interval_length": 8}, "gradient_clipping": 1.01}'))
    assert capped[40].action == "skip" and capped[0].scale == pytest.approx(1.01 / 1.02, rel=1e-5) and capped[1].scale == 1.0


def test_a_norm_json_could_not_say_is_skipped_and_an_overflow_is_not_fed() -> None:
    norms: list[float | None] = [*NORMS[:30], None, *NORMS[30:]]
    assert decisions(run(norms), question('{"zclip": {}}'))[30].reason == "the gradient norm is not finite"
    assert decisions(run(norms, {30: "overflow: the fp16 loss scale falls"}), question('{"zclip": {}}'))[30].reason == "overflow"
    assert all(math.isfinite(d.scale) for d in decisions(run(norms), question('{"autoclip": {}}')))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zclip", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"zclip": {"z_tresh": 1}}', "z_tresh"),
        ('{"zclip": {"scope": "layer"}}', "use scope global"),
        ('{"adagc": {}}', "use scope global"),
        ('{"zclip": {}, "autoclip": {}}', "both given"),
    ],
)
def test_bad_questions_say_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        decisions(run(NORMS), question(text))
