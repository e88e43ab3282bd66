"""The arithmetic of the figure ``recompute``, and that its contestants are configs."""

from __future__ import annotations

from megastab.config.load import load_config
from megastab.plan.plan import plan
from megastab.report.bench.cases import Spec
from megastab.report.bench.recompute import rows
from megastab.report.bench.series import Times


def test_rows_compare_with_the_plan_and_with_none() -> None:
    planned = plan(load_config(Spec("offload", "deep").source(), world_size=1)).policies
    grown = [1.1 * policy.peak for policy in planned]
    taken = [Times([seconds] * 3, [2 * seconds] * 3) for seconds in (1.0, 1.1, 1.3)]
    found = list(rows("case", planned, grown, taken))
    assert [round(row.value or 0, 6) for row in found] == [1.1, 1.0, 1.1, 1.1, 1.1, 1.3]
    assert f"{planned[2].peak / 1e6:,.0f} planned" in found[4].detail and "by CPU time 1.300" in found[5].detail


def test_contestants_are_configs() -> None:
    spec = Spec("offload", "deep", recompute="full")
    assert Spec.parse(spec.dump()) == spec
    assert load_config(spec.source(), world_size=1).megastab.parallel.recompute == "full"
