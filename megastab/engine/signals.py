"""Asked to stop: SIGTERM, SIGUSR1 (which Slurm can send before the end) and Ctrl-C set a flag, and the loop leaves at its next look.

Launchers reach ranks at different moments, or one rank only, so the ranks agree: one all-reduce of one integer on the CPU at each
boundary of a step and between micro-batches of an evaluation. It waits for no kernel, and the step's own collectives have just brought
the ranks together.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megastab.parallel import collectives

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN_SECONDS = 5.0  # Ctrl-C and Slurm reach a rank directly and through its launcher: what comes this soon is the same request


class StopRequest:
    """Whether this rank was asked to stop, and whether any was."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal that asked this rank; empty if none did."""
        self.asked_at = 0.0
        self.is_agreed = False
        """Whether some rank was asked, as all ranks know."""
        self._is_saved = False
        self._channel = collectives.own_channel()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside (main thread only). A second one ends this process at once."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
        finally:
            if not self._is_saved:  # else launchers may still send what they like: the run leaves in order
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.asked, self.asked_at = signal.Signals(number).name, time.monotonic()
        elif not self._is_saved and number != signal.SIGUSR1 and time.monotonic() - self.asked_at > AGAIN_SECONDS:
            os._exit(128 + number)

    def poll(self) -> bool:
        """Whether any rank was asked by now (collective over the job); once true it stays so, without asking again."""
        self.is_agreed = self.is_agreed or collectives.any_of(bool(self.asked), self._channel)
        return self.is_agreed

    def saved(self) -> None:
        """The run is saved and is leaving: whatever comes now, it leaves in order."""
        self._is_saved = True
