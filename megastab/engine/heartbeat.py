"""A file per rank that says how far it is: ``heartbeats/rank0003`` in the run folder, and who lags when nobody moves.

The loop writes it as it passes, at most once a second. When a rank has not moved for too long it asks the others by a file; the
watching thread of each (engine.watch) answers with where its main thread stands. A rank that cannot answer is stopped or its machine is
gone; of those that answer, the ones that are not waiting for others in a collective, or have come less far, are what the rest waits for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megastab.engine.processes import HOST, started

FOLDER = "heartbeats"
ASKED = "asked"  # in it: who moves?
WRITE_SECONDS = 1.0


@dataclass(frozen=True)
class Beat:
    """What one rank's file says."""

    rank: int
    host: str = HOST
    pid: int = 0
    mark: str | None = ""
    step: int = 0
    """Steps done."""
    phase: str = "starting"
    count: int = 0
    """Places passed; alike on ranks that are equally far."""
    time: float = 0.0
    """When it was written, in seconds of the epoch."""
    answers: float = 0.0
    """The question it answers; 0 outside a hang."""
    where: str = ""
    """Where the main thread stood at the answer."""
    is_waiting: bool = False
    """Whether that was inside a collective."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}), {self.phase} after step {self.step}"


class Heart:
    """This rank's own."""

    def __init__(self, run_folder: Path, rank: int):
        self.folder = run_folder / FOLDER
        self.now = Beat(rank, pid=os.getpid(), mark=started(os.getpid()))
        self.moved_at = time.monotonic()
        """When the loop last passed here."""
        self._written_at = -WRITE_SECONDS

    def begin(self) -> None:
        """The folder is there: write for the first time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def beat(self, step: int, phase: str) -> None:
        """The loop passes: ``step`` steps are done and ``phase`` begins."""
        self.moved_at = time.monotonic()
        self.now = replace(self.now, step=step, phase=phase, count=self.now.count + 1)
        if self.moved_at - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self, **more: object) -> None:
        """Put it on the disk; a disk that is full or away ends no run."""
        self._written_at = time.monotonic()
        beat = replace(self.now, time=time.time(), **more)  # type: ignore[arg-type]
        path = self.folder / f"rank{beat.rank:04d}"
        try:
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(asdict(beat)) + "\n")
            os.replace(aside, path)
        except OSError:
            pass


def read_beats(run_folder: Path) -> dict[int, Beat]:
    """Every rank's last beat that can be read."""
    beats = {}
    for path in (run_folder / FOLDER).glob("rank????"):
        try:
            beat = Beat(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        beats[beat.rank] = beat
    return beats


def who_lags(beats: Mapping[int, Beat], world: int, questions: Collection[float]) -> tuple[list[int], str]:
    """The ranks the others wait for, and why it is them; none where all look alike.

    Args:
        beats: by rank, after there was time to answer.
        world: ranks of the job.
        questions: that were asked, any of which may have been answered.
    """
    silent = [rank for rank in range(world) if rank not in beats or beats[rank].answers not in questions]
    if silent:
        return silent, "does not answer: stopped, or its machine is gone"
    counts = {rank: beats[rank].count for rank in range(world)}
    least = min(counts.values())
    if least < max(counts.values()):
        return [rank for rank, count in counts.items() if count == least], "has come less far than the others"
    busy = [rank for rank in range(world) if not beats[rank].is_waiting]
    if 0 < len(busy) < world:
        return busy, "is not waiting for others, while they wait"
    return [], "all ranks answer, and all stand alike"


def describe_hang(beats: Mapping[int, Beat], lagging: Sequence[int], why: str, seconds: float) -> str:
    """The message."""
    said = [f"no progress for {seconds:.0f} seconds: {'; '.join(_lagging(beats.get(rank), rank) for rank in lagging) or 'no rank lags'}"]
    said[0] += f" ({why})"
    shown = lagging or sorted(beats)[:4]
    said += [f"  rank {rank} stands in {beats[rank].where}" for rank in shown if rank in beats and beats[rank].where]
    return "\n".join(said)


def _lagging(beat: Beat | None, rank: int) -> str:
    if beat is None:
        return f"rank {rank}, which never wrote a heartbeat"
    return f"{beat}, last heard of {time.time() - beat.time:.0f} seconds ago"
