"""What differs between hosts is told by name, value and rank."""

from __future__ import annotations

from megastab.engine.preflight import CLOCK_SECONDS, Facts, disagreements

SAME = {"python": "3.11.7", "torch": "2.13.0", "data/c4.bin": "100 bytes"}


def test_equal_hosts_have_nothing_to_tell() -> None:
    assert disagreements([Facts("a", 100.0, SAME), Facts("b", 100.0 + CLOCK_SECONDS, SAME)]) == []


def test_each_difference_is_one_line_with_its_ranks() -> None:
    old = {**SAME, "torch": "2.12.0"}
    lines = disagreements([Facts("a", 0.0, SAME), Facts("a", 0.0, SAME), Facts("b", 0.0, old), Facts("b", 0.0, old)])
    assert lines == ["torch: 2.13.0 on a, 2.12.0 on b (ranks 2, 3)"]


def test_three_hosts_three_values() -> None:
    lines = disagreements([Facts("a", 0.0, SAME), Facts("b", 0.0, {**SAME, "torch": "1"}), Facts("c", 0.0, {"python": "3.11.7"})])
    assert lines == [
        "torch: 2.13.0 on a, 1 on b (rank 1)",
        "torch: 2.13.0 on a, missing on c (rank 2)",
        "data/c4.bin: 100 bytes on a, missing on c (rank 2)",
    ]


def test_a_clock_that_is_off() -> None:
    lines = disagreements([Facts("a", 1000.0, SAME), Facts("b", 1000.0 - 2 * CLOCK_SECONDS, SAME)])
    assert lines == ["the clock: -120 s against a's on b (rank 1)"]
