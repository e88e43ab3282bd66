"""Every rank's own seconds, measured on each and brought together at the end of a window of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megastab.config.schema_telemetry import StragglerConfig
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.parallel.waiting import Span, Waiting
from megastab.telemetry.straggler import Peer, Straggler, Window, medians, paces
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.waiting import count_waiting


class RankTimes:
    """This rank's own seconds of every step, and every ``config.steps`` of them all ranks' (collective over the job then).

    An accelerator's waits are read when it has passed them, which may be a step later: such a step counts in the next window.

    Args:
        config: how many steps to a window, and who is slow.
        waiting: what counts this process's waits.
        peers: by rank, where it runs.
    """

    def __init__(self, config: StragglerConfig, waiting: Waiting, peers: Sequence[Peer]):
        self.config, self.waiting, self.straggler = config, waiting, Straggler(config, peers)
        self.last: Window | None = None
        """The latest window."""
        self.restart()

    def restart(self) -> None:
        """Begin a new window, with nobody told to be slow: the run goes on from elsewhere."""
        self._pending: list[tuple[float, float, list[Span]]] = []
        self._own: list[float] = []
        self._data: list[float] = []
        self._count = 0
        self.straggler.told = []

    def begin(self) -> None:
        """A step begins."""
        self.waiting.begin()

    def end(self, seconds: float, data_seconds: float = math.nan) -> None:
        """A step is over.

        Args:
            seconds: from :meth:`begin` on.
            data_seconds: of these, fetching its samples; NaN where nobody can tell.
        """
        self._pending.append((seconds, data_seconds, self.waiting.end()))
        self._count += 1
        self._read()

    def _read(self) -> None:
        """Take the steps whose waits are known by now."""
        while self._pending:
            seconds, data_seconds, spans = self._pending[0]
            waited = self.waiting.clock.seconds(spans)
            if waited is None:
                return
            self._own.append(seconds - waited)
            self._data.append(data_seconds)
            del self._pending[0]

    def window(self, step: int) -> Window | None:
        """After step number ``step`` has ended on every rank: at the end of a window what it tells, on every rank alike."""
        if self._count < self.config.steps:
            return None
        table = collectives.gather_doubles(medians(self._own, self._data))  # over all ranks: [ranks, own and data]
        own, data = table[:, 0].tolist(), table[:, 1].tolist()
        stages = [peer.stage for peer in self.straggler.peers]
        events = self.straggler.judge(step, self.config.steps, paces(own, data, stages))
        self._own, self._data, self._count = [], [], 0
        self.last = Window(step, self.config.steps, own, data, stages, self.config.over, tuple(events))
        return self.last


def rank_times(config: StragglerConfig | None, adapter: Adapter, grid: Grid, host: str) -> RankTimes | None:
    """Begin to count what this process waits for (collective over the job); None where that is switched off, or this rank is alone."""
    if config is None or collectives.world()[1] == 1:
        return None
    waiting = Waiting()
    count_waiting(adapter.engine, waiting)
    return RankTimes(config, waiting, [Peer(*each) for each in collectives.gather_objects((host, grid.pp.rank))])
