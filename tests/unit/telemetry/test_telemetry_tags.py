"""The page of scalars is the table, and every scalar the trainer sends is in it."""

from __future__ import annotations

from megastab.telemetry.tags import TAGS, to_markdown
from megastab.telemetry.throughput import peak_tflops, rates
from tests.launching import ROOT


def test_page_is_current() -> None:
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert page == to_markdown(), "run: python -m megastab.telemetry.tags > docs/telemetry.md"


def test_names_are_unique() -> None:
    assert len({tag.name for tag in TAGS.values()}) == len(TAGS)


def test_rates_follow_from_tokens_and_time(monkeypatch) -> None:
    monkeypatch.setenv("MEGASTAB_PEAK_TFLOPS", "2")
    found = rates(tokens=1000, seconds=0.5, flops_per_token=1e9, ranks=2)
    assert found == {"tokens_per_second": 2000.0, "model_tflops": 1.0, "mfu": 0.5}
    assert set(found) <= set(TAGS)


def test_mfu_needs_a_known_peak(monkeypatch) -> None:
    monkeypatch.delenv("MEGASTAB_PEAK_TFLOPS", raising=False)
    assert peak_tflops() is None  # the CPU's peak is not in the table
    assert "mfu" not in rates(1, 1.0, 1.0, 1)
