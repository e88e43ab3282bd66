"""Whether a process of this machine is the one that was met before: its id may have been given to another since."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

HOST = socket.gethostname()
PROC = Path("/proc")


def space() -> str:
    """Within which process ids mean anything: containers of one host name may have their own."""
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """A mark of when a process started, none of another's; None if it is gone (a zombie is), empty where the system does not tell."""
    if not (PROC / "self" / "stat").exists():
        return ""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()  # the name in brackets may hold anything
    except OSError:
        return None
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{_boot()}-{ticks}"


def is_gone(pid: int, mark: str) -> bool:
    """Whether the process of this machine that bore ``mark`` has ended."""
    now = started(pid)
    return now is None or (bool(now) and bool(mark) and now != mark)


@cache
def _boot() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
