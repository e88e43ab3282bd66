"""The arithmetic of the figure ``offload``, and that its contestants are configs."""

from __future__ import annotations

from typing import Any

from megastab.config.load import load_config
from megastab.report.bench.cases import Spec
from megastab.report.bench.offload import rows
from megastab.report.bench.series import Times


def test_rows_are_ratios_over_the_run_in_place() -> None:
    known = {"grown": 55e6, "out_rate": 2e9, "in_rate": 4e9, "written": 60, "forwarded": 20, "kept": 20, "waited_seconds": 0.5}
    mine = (Times([1.0, 1.1, 1.2], [2.0, 2.0, 2.0]), known)
    memory, step = rows("case", mine, (Times([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), {"grown": 100e6}))
    assert memory.value == 0.55 and memory.verdict == "ok" and step.value == 1.1 and step.verdict == "MISSED"
    for said in ("55 MB", "100 in place", "out at 2.00 GB/s, back at 4.00", "60% was written, 20% taken back", "waited 0.50 s"):
        assert said in memory.detail
    assert "1,100 ms, in place 1,000" in step.detail and "by CPU time 2.000" in step.detail


def test_contestants_are_configs() -> None:
    section: dict[str, Any] = {"kind": "ssd", "folder": "/x", "amount": "all"}
    spec = Spec("offload", "deep", activations=section)
    assert Spec.parse(spec.dump()) == spec
    assert load_config(spec.source(), world_size=1).megastab.parallel.activation_offload.amount == "all"
    assert load_config(Spec("offload").source(), world_size=1).megastab.parallel.activation_offload.kind == "none"
