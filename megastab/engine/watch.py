"""A thread beside the loop that ends this rank when going on is hopeless; what it says goes to stderr before.

    what is seen                                              exit code
    --------------------------------------------------------  ---------
    no progress for ``run.hang_seconds``                      87, after naming the hosts that do not answer or the ranks that lag
    a rank on this machine has died                           87, at once, whether or not the backend notices
    asked to stop ``run.stop_seconds`` ago and still here     87

It sends nothing through the job's backend, which may be what hangs, and leaves by ``os._exit``: the main thread may be inside a kernel.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megastab.config.schema import RunConfig
from megastab.engine.heartbeat import ASKED, Beat, Heart, describe_hang, read_beats, who_lags
from megastab.engine.processes import HOST, is_gone
from megastab.engine.reach import Hosts
from megastab.engine.run_lock import RunLock
from megastab.engine.signals import StopRequest
from megastab.parallel import collectives

LOST = 87
LOOK_SECONDS = 1.0  # between looks at the processes of this machine
ASK_SECONDS = 5.0  # between looks at the run folder, which may be on a slow disk
SPOKEN_SECONDS = 2.0  # the others leave this much after the one that speaks
WAITING_FILES = ("torch/distributed/", "deepspeed/comm/", "parallel/collectives.py", "parallel/waiting.py", "engine/signals.py")


class Watch(threading.Thread):
    """One rank's watching thread.

    Args:
        heart: that the loop moves.
        peers: every rank's first beat.
        run: the run's limits.
        stop: what asks this rank to stop.
        lock: of the run folder, on the rank that holds it.
        hosts: of the job.
    """

    def __init__(
        self, heart: Heart, peers: Sequence[Beat], run: RunConfig, stop: StopRequest, lock: RunLock | None, hosts: Hosts | None = None
    ):
        super().__init__(name="watch", daemon=True)
        self.hosts = hosts
        self.heart, self.run_folder, self.limits, self.stop, self.lock = heart, heart.folder.parent, run, stop, lock
        self.world = len(peers)
        self.rank = heart.now.rank
        mine = [beat for beat in peers if beat.host == HOST and beat.rank != self.rank]
        self.neighbours = [beat for beat in mine if not is_gone(beat.pid, beat.mark or "")]  # a container may hide the others
        self._main = threading.main_thread().ident
        self._is_over = threading.Event()
        self._answered = _asked(self.run_folder)  # a question of an earlier run
        self._asked_at = time.monotonic()

    def leave(self) -> None:
        """Stop watching: the run ends in order, or has an error of its own to tell."""
        self._is_over.set()

    def run(self) -> None:
        """Look, until the run is over."""
        seconds = self.limits.hang_seconds
        every = min(ASK_SECONDS, (seconds or ASK_SECONDS) / 4)
        while not self._is_over.wait(min(LOOK_SECONDS, every)):
            if self.lock is not None:
                self.lock.touch()
            self._look_for_the_dead()
            self._look_at_the_clock()
            if time.monotonic() - self._asked_at >= every:
                self._asked_at = time.monotonic()
                self._answer()
                if seconds is not None and self._still_for() > seconds:
                    self._find_who_lags(seconds, 4 * every)

    def _still_for(self) -> float:
        return time.monotonic() - self.heart.moved_at

    def _look_for_the_dead(self) -> None:
        gone = [beat for beat in self.neighbours if is_gone(beat.pid, beat.mark or "")]
        if gone and not self._is_over.wait(LOOK_SECONDS):  # it may have left in order, and so may this rank be about to
            alive = [beat.rank for beat in self.neighbours if beat not in gone]
            said = "; ".join(f"rank {beat.rank} on {beat.host} (process {beat.pid}) is gone" for beat in gone)
            self._end(said, [*alive, self.rank])

    def _look_at_the_clock(self) -> None:
        limit = self.limits.stop_seconds
        if self.stop.asked and limit is not None and time.monotonic() - self.stop.asked_at > limit:
            self._end(f"{self.stop.asked} came {limit:.0f} seconds ago and the run has not left yet ({self.heart.now})", [self.rank])

    def _answer(self) -> None:
        """Say where this rank stands if somebody asks."""
        question = _asked(self.run_folder)
        if question != self._answered:
            self._answered = question
            where, is_waiting = place_of(self._main)
            self.heart.write(answers=question, where=where, is_waiting=is_waiting)

    def _find_who_lags(self, seconds: float, patience: float) -> None:
        """Ask where everybody stands; end the job unless this rank moves meanwhile."""
        began, moved_at, questions = time.monotonic(), self.heart.moved_at, set[float]()
        if abs(time.time() - _asked(self.run_folder)) > 2 * patience:  # nobody has asked yet
            _ask(self.run_folder)
        while time.monotonic() - began < patience:
            self._answer()  # several ranks may ask at once, each by a question of its own
            questions.add(self._answered)
            if self._is_over.wait(LOOK_SECONDS / 2) or self.heart.moved_at != moved_at:
                return
        if self.hosts is not None and (lost := self.hosts.lost()):
            # Both sides of a cut speak: neither can read what the other says.
            away = [rank for host in lost for rank in host.ranks]
            said = f"no progress for {seconds:.0f} seconds: {'; '.join(host.said for host in lost)} cannot be reached over the network"
            self._end(said, [rank for rank in range(self.world) if rank not in away])
        beats = read_beats(self.run_folder)
        lagging, why = who_lags(beats, self.world, questions)
        self._end(describe_hang(beats, lagging, why, seconds), [rank for rank in range(self.world) if rank not in lagging])

    def _end(self, message: str, speakers: Sequence[int]) -> None:
        """Leave; the first of ``speakers`` says why."""
        if self._is_over.is_set():
            return
        if self.rank == min(speakers, default=self.rank):
            print(f"error: {message}", file=sys.stderr)
            self._write_event(message)
        else:
            time.sleep(SPOKEN_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)

    def _write_event(self, message: str) -> None:
        line = {"step": self.heart.now.step, "kind": "hang", "reason": message}
        try:
            with open(self.run_folder / "events.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            pass


@contextmanager
def watching(heart: Heart, run: RunConfig, stop: StopRequest, lock: RunLock | None) -> Iterator[None]:
    """Watch this rank and its neighbours while inside (collective over the job at entry)."""
    heart.begin()
    watch = Watch(heart, collectives.gather_objects(heart.now), run, stop, lock, Hosts.meet())
    watch.start()
    try:
        yield
    finally:
        watch.leave()


def place_of(thread: int | None) -> tuple[str, bool]:
    """Where a thread stands, innermost first, and whether that is inside a collective."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "", False
    frames = traceback.extract_stack(frame)[::-1]
    innermost = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:3]]
    return " < ".join(innermost), any(part in f.filename for f in frames[:3] for part in WAITING_FILES)


def _asked(run_folder: Path) -> float:
    try:
        return float((run_folder / "heartbeats" / ASKED).read_text())
    except (OSError, ValueError):
        return 0.0


def _ask(run_folder: Path) -> None:
    aside = run_folder / "heartbeats" / f"{ASKED}.{os.getpid()}"
    try:
        aside.write_text(repr(time.time()))
        os.replace(aside, run_folder / "heartbeats" / ASKED)
    except OSError:
        pass
