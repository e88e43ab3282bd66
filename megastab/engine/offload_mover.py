"""Storages on their way out and back: threads that write and read, and the rule of who holds the memory meanwhile.

An entry holds its tensor until the write is done. Whoever wants it before takes it from memory (forwarding), and the write counts for
nothing; whoever wants it after waits for a read. Entries live as long as the graph that saved them: with it their slots are free again.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megastab.engine.offload_amount import Rate
from megastab.engine.offload_lane import Lane
from megastab.engine.offload_store import Slot, Store

THREADS = 2  # a direction: one copies while the disk serves the other
log = logging.getLogger("megastab")


@dataclass
class Counts:
    """Bytes since the start, and seconds."""

    written: int = 0
    forwarded: int = 0
    """Taken from memory because backward came first."""
    read: int = 0
    kept: int = 0
    """Eligible and left where they were: no room, not enough time, or a failed write."""
    shared: int = 0
    """Saved again by another operation, and not written again."""
    waited_seconds: float = 0.0


class Entry:
    """One storage of the graph."""

    def __init__(self, tensor: Tensor, slot: Slot, store: Store, mark: Any):
        storage = tensor.untyped_storage()
        self.identity = StorageWeakRef(storage)  # while it lives no other storage has this address
        self.tensor: Tensor | None = tensor
        """An alias of what was saved, or of what was read back; None while the bytes are outside only."""
        self.version, self.is_original, self.shift = tensor._version, True, 0
        """``shift``: bytes of the storage that was read back before those that were saved."""
        self.size, self.device = storage.nbytes(), tensor.device
        self.slot, self.store, self.mark = slot, store, mark
        self.is_wanted = self.is_torn = False
        self.writing: Future[None] | None = None
        self.reading: Future[None] | None = None

    def __del__(self) -> None:
        self.store.free(self.slot)  # no thread uses it: a thread at work holds the entry

    @property
    def key(self) -> int:
        """Of the storage."""
        return int(self.identity.cdata)


def bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor`` as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Mover:
    """Writers and readers over one store."""

    def __init__(self, store: Store):
        self.store, self.lane, self.counts = store, Lane(), Counts()
        self.out_rate, self.in_rate = Rate(), Rate()
        self._lock = threading.Lock()
        self._has_warned = False
        self._writers = ThreadPoolExecutor(THREADS, "offload-write", self.lane.enter_thread)
        self._readers = ThreadPoolExecutor(THREADS, "offload-read", self.lane.enter_thread)

    def send(self, tensor: Tensor) -> Entry | None:
        """Start moving the storage of ``tensor`` out; None where there is no room for it."""
        size = tensor.untyped_storage().nbytes()
        try:
            slot = self.store.allocate(size)
        except (RuntimeError, MemoryError) as error:  # host memory that cannot be pinned
            slot = None
            self._warn(error)
        if slot is None:
            return None
        entry = Entry(tensor, slot, self.store, self.lane.moment())
        entry.writing = self._writers.submit(self._write, weakref.ref(entry))
        return entry

    def _write(self, reference: weakref.ref[Entry]) -> None:
        entry = reference()
        if entry is None or entry.is_wanted or entry.tensor is None:
            return
        tensor = entry.tensor
        try:
            with self.out_rate.busy(entry.size), self.lane.after(entry.mark):
                self.store.put(entry.slot, bytes_of(tensor))
        except Exception as error:  # whatever it is, the tensor is still there
            self._warn(error)
            entry.is_wanted = True
            self.counts.kept += entry.size
            return
        with self._lock:
            if entry.is_wanted:
                return
            entry.is_torn = tensor._version != entry.version
            entry.tensor = None
            self.counts.written += entry.size

    def _warn(self, error: BaseException) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("activation offload: %s: what cannot be moved out stays in memory; nothing is lost (said once)", error)

    def fetch(self, entry: Entry) -> None:
        """Backward is near: read it, or if it is still on its way out, keep it."""
        with self._lock:
            if entry.tensor is not None:
                self.counts.forwarded += entry.size if entry.is_original and not entry.is_wanted else 0
                entry.is_wanted = True
            elif entry.reading is None:
                # Allocated here, among the compute stream's memory: a thread's own would be another arena, or another stream's pool.
                target = self.store.target(entry.slot, entry.size, entry.device)
                entry.reading = self._readers.submit(self._read, entry, target, self.lane.moment())

    def _read(self, entry: Entry, target: Tensor, mark: Any) -> None:
        with self.in_rate.busy(entry.size), self.lane.after(mark):
            self.store.get(entry.slot, target)
        entry.is_original, entry.shift = False, int(target.storage_offset())
        entry.tensor = target
        with self._lock:
            self.counts.read += entry.size

    def take(self, entry: Entry) -> Tensor:
        """The tensor, from wherever it is, for the compute stream.

        Raises:
            RuntimeError: it was changed in place after it was saved, or the disk does not give back what it was given.
        """
        self.fetch(entry)
        if entry.reading is not None and entry.tensor is None and not entry.is_torn:
            began = time.perf_counter()
            entry.reading.result()
            self.counts.waited_seconds += time.perf_counter() - began
        tensor = entry.tensor
        if entry.is_torn or (tensor is not None and entry.is_original and tensor._version != entry.version):
            raise RuntimeError(f"a tensor of {entry.size} bytes that backward needs was changed in place after it was saved")
        assert tensor is not None
        return tensor

    def settle(self, entry: Entry) -> None:
        """Wait until it is out."""
        if entry.writing is not None:
            entry.writing.result()
