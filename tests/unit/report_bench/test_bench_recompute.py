"""The figure that measures recompute policies beside what is planned of them."""

from __future__ import annotations

from megastab.config.load import load_config
from megastab.plan.recompute import Policy
from megastab.report.bench.cases import Spec
from megastab.report.bench.recompute import rows
from megastab.report.bench.series import Times


def test_a_contestant_trains_under_its_policy() -> None:
    for policy in ("none", "selective", "full"):
        assert load_config(Spec("offload", "deep", recompute=policy).source(), world_size=1).megastab.parallel.recompute == policy


def test_measured_and_planned_stand_beside_each_other() -> None:
    full, none = Policy("full", 10, 30_000_000, 1.3), Policy("none", 100, 120_000_000, 1.0)
    ours, theirs = Times([1.2, 1.2, 1.8], [2.4, 2.4, 2.4]), Times([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    memory, time = rows("deep", (full, none), (ours, {"grown": 50e6}), (theirs, {"grown": 200e6}))
    assert (memory.value, memory.case) == (0.25, "deep, full: peak of a step")
    assert memory.detail.startswith("planned 0.250; 50 MB at the peak of a step, planned 30; without 200 MB, planned 120")
    assert time.value == 1.2 and "planned 1.300 by products" in time.detail and "by CPU time 1.200" in time.detail
    assert memory.verdict == time.verdict == ""  # nothing is promised
