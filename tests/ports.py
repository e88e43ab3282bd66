"""Ports for test jobs. Two pytest workers never draw from the same numbers, nor from those the system gives to outgoing connections."""

from __future__ import annotations

import os
import random
import socket
from itertools import count

FIRST, EACH, WORKERS = 20000, 1000, 12  # ends below 32768, where Linux's own begin
_next = count(random.randrange(EACH))  # two runs on one machine start elsewhere


def free_port() -> int:
    """A port nobody listens on, and that nobody else of this run will be given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % WORKERS
    for _ in range(EACH):
        port = FIRST + EACH * worker + next(_next) % EACH
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"every port from {FIRST + EACH * worker} on is in use")
