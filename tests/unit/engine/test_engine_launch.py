"""How a job ends: the exit code, and one message from the rank that knows why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.engine.launch import own_device
from megastab.parallel.collectives import PeerFailed

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys
from megastab.config.errors import UserError
from megastab.engine.launch import run_job
from megastab.parallel import collectives

def work():
    kind = sys.argv[1]
    if kind == "user":
        raise UserError("no such file: give another")
    if kind == "peer":
        raise collectives.PeerFailed("rank 1 failed")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    print("world", collectives.world())

sys.exit(run_job(work))
"""


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [("fine", 0, ""), ("user", 2, "error: no such file: give another\n"), ("peer", 2, ""), ("bug", 1, "ZeroDivisionError: a bug")],
)
def test_exit_code_and_message(kind: str, code: int, said: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT, kind], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr and ("Traceback" in ended.stderr) == (kind == "bug")
    assert ("world (0, 1)" in ended.stdout) == (kind == "fine"), "a process nobody launched is a job of one rank"


def test_a_rank_without_a_device_is_told_once_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "6")
    for local, found in ((0, 0), (3, 3)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert own_device(4) == found
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="rank 6 on .* is number 4 of its host and sees 4 devices: .*slots="):
        own_device(4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(PeerFailed):
        own_device(4)
