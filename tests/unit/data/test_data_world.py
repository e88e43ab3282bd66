"""Who takes part, by what the launcher says; and how many workers a rank has."""

from __future__ import annotations

import os

import pytest

from megastab.config.errors import UserError
from megastab.config.ranks import DIALECTS
from megastab.data.world import ALONE, default_workers, join, joined


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for dialect in DIALECTS:
        for name in dialect[1:]:
            monkeypatch.delenv(name, raising=False)


def test_one_process_is_alone_whatever_else_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join() is ALONE
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "SLURM_PROCID": "0",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert join() is ALONE
    assert (ALONE.from_first(lambda: 5), ALONE.of_all(6), ALONE.heard()) == (5, [6], [])


def test_error_of_one_process_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: no such thing$"), joined():
        raise UserError("no such thing")
    with pytest.raises(ZeroDivisionError), joined():
        _ = 1 // 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, 16),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, 16),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 6),  # the launcher ties the rank to six cores
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "99"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),3"}, 2),
    ],
)
def test_a_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch, names: dict[str, str], expected: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert default_workers() == expected
