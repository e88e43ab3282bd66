"""One run a folder: live holders are respected, dead ones are not, and clocks are not compared between machines."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from megastab.config.errors import UserError
from megastab.engine import run_lock
from megastab.engine.processes import HOST, is_gone, space, started
from megastab.engine.run_lock import RunLock, lock_folder


def write(folder: Path, **holder: object) -> Path:
    path = folder / run_lock.FILE
    path.write_text(
        json.dumps({"host": HOST, "space": space(), "pid": os.getppid(), "mark": started(os.getppid()), "since": "noon", **holder})
    )
    return path


def test_a_live_run_is_respected_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path)
    said = path.read_text()
    with pytest.raises(UserError, match=rf"in use by another run \(process {os.getppid()} on .*, since noon\).*remove .*/lock"):
        RunLock.take(tmp_path)
    assert path.read_text() == said and list(tmp_path.iterdir()) == [path]


def test_a_held_folder_is_not_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    write(tmp_path / "run")
    with pytest.raises(UserError, match="in use"):
        lock_folder(tmp_path / "run", is_new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    write(tmp_path / "run", mark="of an earlier process with this id")
    folder, lock = lock_folder(tmp_path / "run", is_new=True)
    assert folder.kept == tmp_path / "run.1" and not (tmp_path / "run.1" / "lock").exists() and lock.path.exists()
    lock.release()
    assert not lock.path.exists()


@pytest.mark.parametrize("holder", [{"pid": 1 << 30}, {"mark": "another"}, {"pid": None, "host": "elsewhere"}, {"space": "a container"}])
def test_a_dead_run_is_taken_over(tmp_path: Path, holder: dict[str, object]) -> None:
    path = write(tmp_path, **holder)
    os.utime(path, (0, 0))
    RunLock.take(tmp_path)
    assert json.loads(path.read_text())["pid"] == os.getpid() and list(tmp_path.iterdir()) == [path]


def test_a_lock_cut_off_by_a_crash_is_judged_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.4)
    path = tmp_path / run_lock.FILE
    path.write_text('{"host": "el')
    RunLock.take(tmp_path)
    assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"space": "a container", "pid": 1 << 30}], ids=["machine", "container"])
def test_a_holder_out_of_sight_must_show_that_it_lives(
    elsewhere: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    path = write(tmp_path, **elsewhere)

    def live() -> None:
        for _ in range(4):
            time.sleep(0.4)
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(UserError, match="is in use by another run"):
        RunLock.take(tmp_path)
    thread.join()
    RunLock.take(tmp_path)  # silent for long enough


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock.take(tmp_path)
    os.utime(lock.path, (0, 0))
    lock.touch()
    assert lock.path.stat().st_mtime == 0  # not yet
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.0)
    lock.touch()
    assert lock.path.stat().st_mtime > 0


def test_a_zombie_is_gone_and_so_is_another_of_its_id() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    deadline = time.monotonic() + 10
    while started(child) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(child, "") and os.waitpid(child, 0) == (child, 0) and is_gone(child, "")
    mine = started(os.getpid())
    assert mine and not is_gone(os.getpid(), mine) and is_gone(os.getpid(), "another")
