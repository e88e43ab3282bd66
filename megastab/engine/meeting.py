"""Everyone is here, or who is not: before the backend joins the ranks, and would wait half an hour in silence for one that never comes.

Every rank enters its number in the store that rank 0 keeps at MASTER_ADDR:MASTER_PORT; rank 0 waits for all and says whom it misses. A
rank that cannot reach the store says that.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

from megastab.config.errors import UserError
from megastab.config.hostfile import host_of
from megastab.parallel import collectives

JOIN_SECONDS = 300.0  # unless MEGASTAB_JOIN_SECONDS says otherwise: hosts started by hand, images pulled, imports from a slow file system
UNKNOWN_SECONDS = 30.0  # for a name the network does not know: some know it a moment after the host is up
NOTICE_SECONDS = 20.0  # before waiting is mentioned
CONNECT_SECONDS = 5.0
GRACE_SECONDS = 30.0  # the others give rank 0, who knows more, time to speak first
MOST_NAMED = 8
ALL_HERE, MISSED = b"all here", b"missed"


def join_seconds() -> float:
    """How long ranks wait for each other.

    Raises:
        UserError: MEGASTAB_JOIN_SECONDS is no time.
    """
    said = os.environ.get("MEGASTAB_JOIN_SECONDS", str(JOIN_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"MEGASTAB_JOIN_SECONDS = {said!r} must be a number of seconds above 0.")
    return seconds


def meet() -> collectives.Store | None:
    """Return when every rank of the job has come (collective over the job, before it is one).

    The store must be held until the backend has joined the ranks: with rank 0's goes its server, which the backend takes over, and which
    a slow rank is still asking.

    Raises:
        UserError: rank 0 misses some, or its port is taken; or this is its host's first rank and cannot reach rank 0.
        PeerFailed: another rank says it.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        return None
    seconds = join_seconds()
    until = time.monotonic() + seconds
    is_kept_for_us = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent keeps it
    if rank or is_kept_for_us:
        _reach(rank, until)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = collectives.job_store(keeps=rank == 0 and not is_kept_for_us, seconds=seconds + GRACE_SECONDS)
    except RuntimeError as error:
        raise UserError(f"{_me(rank)} cannot {'open' if rank == 0 else 'use'} MASTER_PORT at {place} ({_brief(error)}): {_PORT}") from None
    store.set(f"here/{rank}", b"")
    if rank == 0:
        _wait_for_all(store, world, until, place)
        return store
    try:
        met = store.get("met")  # waits for it
    except RuntimeError:  # rank 0 has left, or says nothing
        met = MISSED
    if met != ALL_HERE:
        raise collectives.PeerFailed("rank 0 missed some")
    return store


def _wait_for_all(store: collectives.Store, world: int, until: float, place: str) -> None:
    missing, began, is_told, pause = list(range(1, world)), time.monotonic(), False, 0.02
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        if now > until:
            store.set("met", MISSED)
            raise UserError(
                f"{said_of(missing, world)} did not come to {place} within {now - began:.0f} s: start them, and see whether their hosts "
                "reach that address (MEGASTAB_JOIN_SECONDS: how long to wait)."
            )
        if now - began > NOTICE_SECONDS and not is_told:
            print(f"waiting at {place} for {said_of(missing, world)}, {until - now:.0f} s more", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    store.set("met", ALL_HERE)


def _reach(rank: int, until: float) -> None:
    """Return when something listens where rank 0 should."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    began, pause, is_told = time.monotonic(), 0.05, False
    while True:
        try:
            socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS).close()
            return
        except OSError as error:
            last = error
        now = time.monotonic()
        if now > min(until, began + UNKNOWN_SECONDS if isinstance(last, socket.gaierror) else until):
            _leave_unreached(rank, f"{address}:{port}", last, now - began)
        if now - began > NOTICE_SECONDS and not is_told and _speaks():
            print(f"{_me(rank)} waits for rank 0 at {address}:{port} ({_brief(last)})", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _leave_unreached(rank: int, place: str, error: OSError, seconds: float) -> None:
    message = (
        f"{_me(rank)} cannot reach rank 0 at {place} ({_brief(error)}; tried for {seconds:.0f} s): MASTER_ADDR must be a name or address "
        "of the first host that this host can connect to, and rank 0 must have been started."
    )
    raise UserError(message) if _speaks() else collectives.PeerFailed(message)


def said_of(ranks: Sequence[int], world: int) -> str:
    """Ranks in words, with their hosts where the launcher has told them (``MEGASTAB_HOSTS``)."""
    hosts: dict[str, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(host_of(rank, os.environ.get("MEGASTAB_HOSTS", "")) or "", []).append(rank)
    said = [f"{f'host {host} ' if host else ''}({_numbers(held)} of {world})" for host, held in hosts.items()]
    return ", ".join(said) if "" not in hosts else f"{_numbers(ranks)} of {world}"


def _numbers(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _speaks() -> bool:
    """Whether this rank is the one of its host that says what all of them see."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _me(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _brief(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0][:200]


_PORT = "another job may use it; choose another (deepspeed --master_port N, MASTER_PORT=N)."
