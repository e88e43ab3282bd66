"""Before the first step: do all hosts run the same thing, on the same files, at the same time?

What differs between hosts (an upgrade that missed one, a stale checkout, a folder that is not shared, a clock that is off) would show as
diverging weights, a half checkpoint or a hang. Every rank tells its facts, all compare them, and all leave with one message.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import megastab
from megastab.config.config import Config
from megastab.parallel import collectives

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
CLOCK_SECONDS = 60.0  # locks and heartbeats are judged by the age of files; NTP keeps hosts within a second
FILE_SECONDS = 10.0  # for a new file to be seen through a network file system


class Facts(NamedTuple):
    """What must be equal on every host; values are told in the message as they are."""

    host: str
    clock: float
    """Seconds since the epoch, read when all ranks had met."""
    same: dict[str, str]
    """By what it is called in the message."""


def facts_here(config: Config, run_folder_seen: bool) -> Facts:
    """This process's (collective: the clocks are read after a barrier)."""
    same = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    same["megastab's source"] = source_digest()
    same["the config"] = hashlib.blake2b(json.dumps(config.resolved(), sort_keys=True).encode(), digest_size=6).hexdigest()
    for _, prefix in [*config.megastab.data.train, *config.megastab.data.valid]:
        same[f"{prefix}.bin"] = _size(Path(f"{prefix}.bin"))
    same[f"megastab.run.dir ({config.megastab.run.dir})"] = "shared" if run_folder_seen else "not the first host's folder"
    collectives.barrier()
    return Facts(socket.gethostname(), time.time(), same)


def source_digest() -> str:
    """Of the package's Python files, whatever their folder is called."""
    root, digest = Path(megastab.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def disagreements(everyone: Sequence[Facts]) -> list[str]:
    """What differs from rank 0, a line for each, with the ranks and the host it differs on."""
    first, found = everyone[0], list[str]()
    for name, expected in first.same.items():
        others: dict[tuple[str, str], list[int]] = {}
        for rank, facts in enumerate(everyone):
            if (value := facts.same.get(name, "missing")) != expected:
                others.setdefault((facts.host, value), []).append(rank)
        found += [f"{name}: {expected} on {first.host}, {value} on {_who(host, ranks)}" for (host, value), ranks in others.items()]
    late: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        if abs(facts.clock - first.clock) > CLOCK_SECONDS:
            late.setdefault(facts.host, []).append(rank)
    for host, ranks in late.items():
        found.append(f"the clock: {everyone[ranks[0]].clock - first.clock:+.0f} s against {first.host}'s on {_who(host, ranks)}")
    return found


def check_hosts(config: Config) -> None:
    """End the job on every rank, with one message, where its hosts differ (collective over the job).

    Raises:
        UserError: on rank 0; the others leave quietly.
    """
    rank, world = collectives.world()
    if world == 1:
        return
    folder = Path(config.megastab.run.dir)
    token = folder.with_name(f".{folder.name}.preflight")
    if rank == 0:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(f"{os.getpid()}\n")
    collectives.barrier()
    everyone = collectives.gather_objects(facts_here(config, _appears(token)))
    if rank == 0:
        token.unlink(missing_ok=True)
    if found := disagreements(everyone):
        lines = "".join(f"\n  {line}" for line in found)
        collectives.fail_alike(f"the hosts of this job differ:{lines}\nmake them equal: one shared checkout and environment does")


def _appears(path: Path) -> bool:
    until = time.monotonic() + FILE_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _who(host: str, ranks: Sequence[int]) -> str:
    return f"{host} (rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:
        return "missing"
