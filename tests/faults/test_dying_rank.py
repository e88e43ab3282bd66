"""A rank that dies takes the job down, with its own traceback first."""

from __future__ import annotations

from tests.launching import launch


def test_a_raising_rank_speaks_first_and_ends_the_job() -> None:
    done = launch(script="tests/faults/dying_rank.py", timeout=180)
    assert done.code != 0
    assert "rank 1 failed:" in done.text and "the disk of rank 1 is full" in done.text, done.text
    others = done.text.find("rank 0 failed:")
    assert others == -1 or done.text.index("rank 1 failed:") < others


def test_a_killed_rank_ends_the_job() -> None:
    assert launch("kill", script="tests/faults/dying_rank.py", timeout=180).code != 0
