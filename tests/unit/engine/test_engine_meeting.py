"""Ranks that wait for one that does not come say so, and leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.engine.meeting import join_seconds, said_of

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "import sys; from megastab.engine.launch import run_job; sys.exit(run_job(lambda: None))"


SLOW = """
import time
from megastab.parallel import collectives
made = collectives.job_store

class Slow:
    def __init__(self, store):
        self.set, self.check, self.ask = store.set, store.check, store.get

    def get(self, key):
        time.sleep(2.0)
        return self.ask(key)

collectives.job_store = lambda **given: Slow(made(**given))
"""


def start(
    rank: int, world: int, port: int, address: str = "127.0.0.1", seconds: str = "4", script: str = SCRIPT, **more: str
) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "MEGASTAB_JOIN_SECONDS": seconds, **place, **more}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=300)
    assert "Traceback" not in said, said
    return process.returncode, said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_rank_0_is_there_for_a_rank_that_asks_late() -> None:
    port = free_port()
    ranks = [start(rank, 2, port, seconds="120", script=(SLOW if rank else "") + SCRIPT) for rank in (0, 1)]
    try:
        assert ended(ranks[1])[0] == 0  # first: without it rank 0 would wait in the backend
        assert ended(ranks[0])[0] == 0
    finally:
        for rank in ranks:
            rank.kill()


def test_rank_0_names_the_host_that_did_not_come_and_the_others_leave_quietly() -> None:
    port = free_port()
    ranks = [start(rank, 4, port, seconds="60" if rank else "15", MEGASTAB_HOSTS="a:2,b:2") for rank in (0, 1)]
    (code, said), (other, quiet) = [ended(rank) for rank in ranks]
    assert code == other == 2
    assert said.count("error:") == 1 and f"host b (ranks 2, 3 of 4) did not come to 127.0.0.1:{port}" in said
    assert "error:" not in quiet


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "")])
def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(address: str, why: str) -> None:
    port = free_port()
    code, said = ended(start(1, 2, port, address, seconds="2", LOCAL_RANK="0"))
    assert code == 2 and said.count("error:") == 1
    assert f"rank 1 on {socket.gethostname()} cannot reach rank 0 at {address}:{port}" in said and why in said


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        code, said = ended(start(0, 2, port))
    assert code == 2 and said.count("error:") == 1
    assert f"cannot open MASTER_PORT at 127.0.0.1:{port}" in said and "--master_port" in said


def test_who_is_missing_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_of([3], 4) == "rank 3 of 4"
    assert said_of(range(1, 12), 12) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more of 12"
    monkeypatch.setenv("MEGASTAB_HOSTS", "a:2,b:1,c:1")
    assert said_of([1, 2, 3], 4) == "host a (rank 1 of 4), host b (rank 2 of 4), host c (rank 3 of 4)"


@pytest.mark.parametrize("wrong", ["0", "-1", "soon", "inf", "nan"])
def test_a_wait_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("MEGASTAB_JOIN_SECONDS", wrong)
    with pytest.raises(UserError, match="MEGASTAB_JOIN_SECONDS"):
        join_seconds()
