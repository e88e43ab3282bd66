"""A run's saving: at once, or in the background, where training waits for one copy of the bytes and a thread writes them.

Threads take part in no collective: each rank leaves a note beside its files, and the first rank's thread publishes when all are there.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megastab.checkpoint import store
from megastab.checkpoint.index import Index, Reader
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.pieces import Share, states_share, weights_share
from megastab.checkpoint.writing import (
    STATES_NOTE,
    WEIGHTS_NOTE,
    NotSaved,
    missing_notes,
    partial_of,
    pieces_told,
    prepare,
    refusals,
    refuse,
    write,
)
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.wrappers.adapter import Adapter
from megastab.wrappers.states import scalar_state

POLL_SECONDS = 0.05


class Outcome(NamedTuple):
    """How one checkpoint ended."""

    step: int
    where: Path
    failure: str = ""
    """Why it is not there; older ones stand."""


class Saver:
    """Writes a run's checkpoints into ``folder``. What it returns has not been returned before, and is told by the first rank only."""

    def __init__(
        self,
        adapter: Adapter,
        grid: Grid,
        folder: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        in_background: bool = False,
    ):
        self.adapter, self.grid, self.folder = adapter, grid, folder
        self.keep_last, self.keep_every, self.in_background = keep_last, keep_every, in_background
        self._writing: _Writing | None = None

    def save(self, manifest: Manifest) -> list[Outcome]:
        """Write a checkpoint, or begin to (collective over the job); what has ended since the last call."""
        ended, where = self.finish(), self.folder / store.tag_of(manifest.step)
        try:
            if self.in_background:
                self._begin(manifest)
                return ended
            store.save(self.adapter, self.grid, self.folder, manifest, self.keep_last, self.keep_every)
        except NotSaved as error:
            return [*ended, Outcome(manifest.step, where, str(error))]
        return [*ended, Outcome(manifest.step, where)]

    def _begin(self, manifest: Manifest) -> None:
        rank, _ = collectives.world()
        tag = store.tag_of(manifest.step)
        store.agree(partial_of(self.folder, tag), lambda: prepare(self.folder, tag) if rank == 0 else None)
        states, weights = states_share(self.adapter, self.grid, rank), weights_share(self.adapter.engine.module, self.grid)
        late = weights if self.adapter.partitions_weights else None  # to be made of the masters' files, so that none is gathered
        shares = [_copied(share) for share in (states, weights) if share is not late]
        whole = replace(copy.deepcopy(manifest), scalars=scalar_state(self.adapter))  # training goes on under its lists
        self._writing = _Writing(self, whole, shares, late)

    def poll(self) -> list[Outcome]:
        """At a step boundary: what has ended, if anything, without waiting for other ranks.

        Raises:
            RuntimeError: the thread failed over something that is no disk's fault.
        """
        if self._writing is None or self._writing.thread.is_alive():
            return []
        return self._writing.tell()

    def finish(self) -> list[Outcome]:
        """Wait for what is being written (collective over the job)."""
        if self._writing is None:
            return []
        writing, self._writing = self._writing, None
        for stage in (writing.wrote_states, writing.wrote_all):
            stage.wait()
            if any(collectives.gather_objects(writing.failure)):  # a note may not have found room on a full disk
                writing.give_up.set()
        writing.thread.join()
        collectives.barrier()  # the first rank has published or cleared away
        return writing.tell()


def _copied(share: Share) -> Share:
    return replace(share, tensors=iter([tensor.detach().to("cpu", copy=True) for tensor in share.tensors]))


class _Writing:
    """One checkpoint on its way to the disk."""

    def __init__(self, saver: Saver, manifest: Manifest, shares: Sequence[Share], late: Share | None):
        self.saver, self.manifest, self.shares, self.late = saver, manifest, shares, late
        self.rank, self.world = collectives.world()
        self.tag = store.tag_of(manifest.step)
        self.aside = partial_of(saver.folder, self.tag)
        self.failure = ""
        self.error: BaseException | None = None
        self.outcome: Outcome | None = None
        self.wrote_states, self.wrote_all, self.give_up = threading.Event(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"saving {self.tag}", daemon=True)
        self.thread.start()

    def tell(self) -> list[Outcome]:
        """How it ended, once, on the first rank; nothing on others."""
        if self.error is not None:
            raise RuntimeError(f"the thread that saves {self.tag} failed") from self.error
        told, self.outcome = self.outcome, None
        return [] if told is None else [told]

    def _run(self) -> None:
        try:
            self._write(self.shares, STATES_NOTE)
            self.shares = ()  # the memory is free
            self.wrote_states.set()
            if self.late is not None and self._have_come(STATES_NOTE):
                self._write_late(self.late)
            self.wrote_all.set()
            if self.rank == 0:
                self._publish()
        except BaseException as error:
            self.error = error
            self.failure = self.failure or str(error)
        finally:
            self.wrote_states.set()
            self.wrote_all.set()

    def _write(self, shares: Sequence[Share], note: str) -> None:
        try:
            write(self.aside, self.rank, shares, self.tag, note)
        except OSError as error:
            self.failure = f"rank {self.rank}: {error}"
            refuse(self.aside, self.rank, shares, self.failure, note)

    def _write_late(self, share: Share) -> None:
        """The weights, once the masters of all ranks are on the disk."""
        shares: list[Share] = []
        if share.file and not refusals(self.aside, self.world, STATES_NOTE):
            shares = [replace(share, tensors=Reader(self.aside, Index(pieces_told(self.aside))).rounded(share))]
        self._write(shares, WEIGHTS_NOTE)

    def _have_come(self, note: str) -> bool:
        """Wait for every rank's note; False where one cannot come any more."""
        while missing_notes(self.aside, self.world, note):
            if self.give_up.wait(POLL_SECONDS):
                return False
        return True

    def _publish(self) -> None:
        saver, notes = self.saver, (STATES_NOTE,) if self.late is None else (STATES_NOTE, WEIGHTS_NOTE)
        for note in notes:
            self._have_come(note)
        where = saver.folder / self.tag
        failures = refusals(self.aside, self.world, *notes)
        try:
            if not failures:
                store.publish(saver.folder, self.tag, self.manifest, saver.keep_last, saver.keep_every)
                self.outcome = Outcome(self.manifest.step, where)
                return
        except OSError as error:
            failures = [f"rank {self.rank}: {error}"]
        shutil.rmtree(self.aside, ignore_errors=True)
        self.outcome = Outcome(self.manifest.step, where, str(store.not_saved(self.aside, failures)))
