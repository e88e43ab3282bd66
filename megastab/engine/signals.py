"""Asked to stop: SIGTERM, SIGUSR1 (which Slurm can send before the end) and Ctrl-C set a flag, and the loop leaves at a next look.

Launchers reach ranks at different moments, or one rank only, so the ranks agree on the look at which they leave. Each look, at the
boundary of a step or between micro-batches of an evaluation, hands this rank's flag to a thread, which asks the other ranks' threads over
a channel of its own, and takes up the answer to the flags of the look before: a request is obeyed one look later, on all ranks alike, since
all read the same maximum and look equally often.

Why so. A message of one integer that goes round thousands of ranks takes tenths of a second, which training would wait for in every step
if it asked at once; beside a step it costs nothing. The step's own collectives cannot carry the flag: none that every layout makes
reaches every rank, and most wait for kernels. A key in the job's store that all read would be one server for thousands of reads a step,
and a rank that reads it a moment before it is set leaves a step later than one that reads it a moment after.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._thread = ThreadPoolExecutor(1, "stop")
        self._asking: Future[bool] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside (main thread only). A second one ends this process at once."""
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
            if self._asking is not None:
                self._asking.result()  # every rank has asked as often: none leaves the job while another still waits for its answer
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
        """Look: whether any rank had been asked at the look before this one, or by now where there is one rank; once true it stays so.

        Collective over the job: every rank looks equally often, and all find the same.
        """
        if not self.is_agreed:
            self.is_agreed = self._look()
        return self.is_agreed

    def _look(self) -> bool:
        if not self._channel:
            return bool(self.asked)
        if self._asking is not None and self._asking.result():
            return True
        self._asking = self._thread.submit(collectives.any_of, bool(self.asked), self._channel)
        return False

    def saved(self) -> None:
        """The run is saved and is leaving: whatever comes now, it leaves in order."""
        self._is_saved = True
