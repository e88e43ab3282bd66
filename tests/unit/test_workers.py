"""What the tests stand on: worker processes by the machine's cores, ports that no two share, and ranks that find their imports."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import jobs, ports
from tests.conftest import pytest_xdist_auto_num_workers
from tests.launching import pretrain
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("cores", "arguments", "expected"),
    [
        (1, ["tests"], 0),
        (2, ["tests"], 2),
        (4, ["tests/unit", "tests/faults"], 2),
        (12, ["tests"], 6),
        (64, ["tests"], 8),
        (8, ["tests/unit/test_workers.py"], 0),
        (8, ["tests/unit/test_workers.py::test_a", "tests/unit/test_workers.py::test_b"], 0),
        (8, ["tests/unit/test_workers.py", "tests/unit/test_rooms.py"], 4),
    ],
)
def test_workers_by_cores_and_by_what_is_asked_for(
    cores: int, arguments: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    asked = SimpleNamespace(args=arguments)
    assert pytest_xdist_auto_num_workers(asked) == expected  # type: ignore[arg-type]
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    assert pytest_xdist_auto_num_workers(asked) is None  # type: ignore[arg-type]


def test_a_worker_has_its_own_ports_and_passes_over_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for worker in ("gw0", "gw1", "gw11"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        drawn[worker] = {ports.free_port() for _ in range(50)}
    assert [len(found) for found in drawn.values()] == [50, 50, 50] and len(set.union(*drawn.values())) == 150
    assert all(20000 + 1000 * int(name[2:]) <= port < 21000 + 1000 * int(name[2:]) for name, found in drawn.items() for port in found)
    at = ports.free_port() - ports.FIRST - 11 * ports.EACH + 1
    monkeypatch.setattr(ports, "_next", iter([at, at, at + 1]))
    with socket.socket() as taken:
        taken.bind(("", ports.FIRST + 11 * ports.EACH + at % ports.EACH))
        assert ports.free_port() == ports.FIRST + 11 * ports.EACH + (at + 1) % ports.EACH


def imported_by_building() -> tuple[set[str], int]:
    """On a rank: what had still to be imported, and the threads of the process it was forked from."""
    before = set(sys.modules)
    jobs.start(config_of(Layout(1, zero=2))).step()
    new = {name for name in set(sys.modules) - before if name.partition(".")[0] in ("megastab", "deepspeed")}
    return new, len(os.listdir(f"/proc/{os.getppid()}/task"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_a_rank_finds_its_imports_in_a_server_without_threads() -> None:
    """Four of five parts of a rank's seconds were imports; and what is forked beside another thread may hang on its locks."""
    assert run_ranks(1, imported_by_building) == [(set(), 1)]


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        print("rank 1 is planted")
        raise SystemExit(7)


def test_a_run_without_launcher_has_the_code_and_the_words_of_the_rank_that_failed(config_file: Path) -> None:
    done = pretrain("--deepspeed_config", str(config_file), plant=die_on_rank_1)
    assert (done.code, done.text.count("rank 1 is planted")) == (7, 1), done.text
