"""One run a folder: the first rank holds ``lock`` in it, which says who that is. A second run is refused; a dead one's lock is taken over.

On this machine the process itself is looked for. Of another machine the file tells: its holder touches it every few seconds, so a lock
that does not change for a minute is of a run that has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError
from megastab.engine.processes import HOST, is_gone, space, started
from megastab.telemetry.sinks import RunFolder

FILE = "lock"
TOUCH_SECONDS = 10.0
STALE_SECONDS = 60.0


class RunLock:
    """A lock this process holds."""

    def __init__(self, path: Path):
        self.path = path
        self._touched = time.monotonic()

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """Lock a run folder, made if it is not there; an error if a live run holds it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        mine = {"host": HOST, "space": space(), "pid": os.getpid(), "mark": started(os.getpid())}
        mine["since"] = datetime.now().isoformat(timespec="seconds")
        while True:
            try:
                with open(path, "x") as file:
                    file.write(json.dumps(mine) + "\n")
                return cls(path)
            except FileExistsError:
                _remove_if_stale(path)

    def touch(self) -> None:
        """Say that the holder lives; now and then is enough, more often costs nothing."""
        if time.monotonic() - self._touched >= TOUCH_SECONDS:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):  # a disk that is away for a moment ends no run
                os.utime(self.path)

    def release(self) -> None:
        """Give it up."""
        self.path.unlink(missing_ok=True)


def lock_folder(path: Path, is_new: bool) -> tuple[RunFolder, RunLock]:
    """The run folder, locked before anything in it is touched; with ``is_new`` an earlier run is moved aside."""
    lock = RunLock.take(path)
    folder = RunFolder(path, is_writer=True, is_new=is_new)
    if folder.kept is not None:  # and the lock with it
        (folder.kept / FILE).unlink()
        lock = RunLock.take(path)
    return folder, lock


def _remove_if_stale(path: Path) -> None:
    """Move a dead run's lock away, which one of several that try succeeds in; an error if its run lives."""
    try:
        holder = _read(path)
        is_stale = _is_dead(path, holder)
    except FileNotFoundError:
        return  # given up just now
    if not is_stale:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
        raise UserError(
            f"megastab.run.dir = {path.parent} is in use by another run ({who}): give this run another megastab.run.dir, or end that one; "
            f"if it is dead all the same, remove {path}"
        )
    aside = path.with_name(f"{FILE}.{HOST}.{os.getpid()}")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    aside.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}  # cut off by a crash: judged by its age


def _is_dead(path: Path, holder: dict[str, Any]) -> bool:
    if (holder.get("host"), holder.get("space")) == (HOST, space()) and isinstance(holder.get("pid"), int):
        return holder["pid"] == os.getpid() or is_gone(holder["pid"], str(holder.get("mark") or ""))
    began, seen = time.monotonic(), path.stat().st_mtime
    probe = path.with_name(f"{FILE}.{HOST}.{os.getpid()}")
    while True:
        probe.write_text("")  # clocks of machines differ; two times by one file system do not
        age = probe.stat().st_mtime - seen
        probe.unlink()
        if age > STALE_SECONDS:
            return True
        if path.stat().st_mtime != seen or time.monotonic() - began > STALE_SECONDS:
            return path.stat().st_mtime == seen
        time.sleep(min(1.0, STALE_SECONDS / 4))
