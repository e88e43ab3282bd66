"""How much of each block's activations goes out: what was measured in one micro-batch decides for the next (SSDTrain, sec. 3.3).

Writes leave in the order of the blocks, one after another; a block's must be done when backward comes near, and reading it back must
fit beside the backward of the block after it. A share of the measured bandwidth is left unused, because times vary.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SHARE = 0.8  # of the measured bandwidth that is planned with
MEMORY = 0.9  # weight of what the rate knew at each transfer


@dataclass(frozen=True)
class Seen:
    """One block in one micro-batch, in seconds from one origin."""

    saved: float
    """Its forward ended."""
    needed: float
    """The next block's backward began: time to fetch."""
    begun: float
    """Its own backward began."""
    waited: float
    """Of the time between the two, spent waiting for data."""
    size: int
    """Bytes that might go out."""


def amounts(seen: Sequence[Seen], out_rate: float, in_rate: float) -> list[int]:
    """Bytes of each block that can be out and back in time, at rates in bytes a second."""
    planned, clock = [], 0.0
    for block in seen:
        start = max(clock, block.saved)
        there = SHARE * out_rate * max(0.0, block.needed - start)
        back = SHARE * in_rate * max(0.0, block.begun - block.needed - block.waited)
        amount = min(block.size, int(min(there, back, block.size)))
        planned.append(amount)
        clock = start + amount / out_rate
    return planned


class Rate:
    """Bandwidth of one direction while it is in use, over the transfers of all its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active, self._since = 0, 0.0
        self._bytes = self._seconds = 0.0

    @contextmanager
    def busy(self, size: int) -> Iterator[None]:
        """One transfer."""
        with self._lock:
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                now = time.perf_counter()
                self._seconds = MEMORY * self._seconds + now - self._since
                self._bytes = MEMORY * self._bytes + size
                self._since = now

    @property
    def bytes_per_second(self) -> float:
        """inf before the first transfer."""
        with self._lock:
            return self._bytes / self._seconds if self._seconds else math.inf
