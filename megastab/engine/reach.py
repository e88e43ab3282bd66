"""Which hosts still answer. Asked when the job hangs: a cable or a machine that is gone looks, from inside a collective, like waiting.

One rank of every host listens on a port and says nothing; that it can be connected to is the answer. Not the file system: a host that is
off the network may still reach its disks, and be seen writing there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from megastab.engine.network import LOOPBACK, address_towards, own_address
from megastab.parallel import collectives

CONNECT_SECONDS = 5.0
AT_ONCE = 64  # connections tried side by side


class Place(NamedTuple):
    """Where a rank runs, and where its host listens."""

    name: str
    address: str
    port: int
    """0 but on the rank that listens for its host."""


class Lost(NamedTuple):
    """A host that does not answer."""

    said: str
    ranks: tuple[int, ...]


class Hosts:
    """The job's hosts as they were at its start."""

    def __init__(self, places: Sequence[Place], rank: int):
        self._ranks: dict[tuple[str, str], list[int]] = {}
        self._port: dict[tuple[str, str], int] = {}
        for number, place in enumerate(places):
            host = place[:2]
            self._ranks.setdefault(host, []).append(number)
            self._port[host] = self._port.get(host) or place.port
        self._own = places[rank][:2]

    @classmethod
    def meet(cls) -> Hosts:
        """Everyone tells where it runs; the first rank of each host listens from here on (collective over the job)."""
        rank, _ = collectives.world()
        address = address_towards(os.environ.get("MASTER_ADDR", "")) or own_address()
        name = socket.gethostname(), own_address() if address.startswith(LOOPBACK) else address
        hosts = collectives.gather_objects(name)
        port = _listen() if hosts.index(name) == rank and len(set(hosts)) > 1 else 0
        return cls([Place(*place) for place in collectives.gather_objects((*name, port))], rank)

    def lost(self) -> list[Lost]:
        """The hosts that cannot be connected to from here."""
        others = [host for host in self._ranks if host != self._own]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda host: _answers(host[1], self._port[host]), others))
        return [self._lost(host) for host, answered in zip(others, answers, strict=True) if not answered]

    def _lost(self, host: tuple[str, str]) -> Lost:
        ranks = self._ranks[host]
        said = f"host {host[0]} ({host[1]}; rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))})"
        return Lost(said, tuple(ranks))


def _listen() -> int:
    """A port of this process that accepts connections and closes them, for as long as the process lives."""
    server = socket.create_server(("", 0), backlog=AT_ONCE)

    def accept() -> None:
        while True:
            with contextlib.suppress(OSError):
                server.accept()[0].close()

    threading.Thread(target=accept, name="reach", daemon=True).start()
    return int(server.getsockname()[1])


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
