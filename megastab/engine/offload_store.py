"""Where offloaded activations lie: pinned host memory, or a file without a name.

Slots are of few sizes (at most an eighth above what they hold) and are used again, so that a run soon stops growing. Main-thread code
allocates, any thread frees. A block on disk carries the sum of its 64-bit words, which is compared when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megastab.config.errors import UserError

ALIGNMENT = 4096  # of O_DIRECT: places, lengths and addresses
CHUNK = 4 << 20  # bytes of one request, and of each thread's buffer
SUFFIX = ".activations"
_counter = itertools.count()


@dataclass
class Slot:
    """Room for one storage."""

    size: int
    """Of the room, not of what it holds."""
    place: Any
    """An offset in the file, or a tensor of bytes."""
    sums: list[int] = field(default_factory=list)
    """Of each chunk on disk."""


def room_for(size: int) -> int:
    """``size`` rounded up to a slot's: eight sizes between a power of two and the next, multiples of the alignment."""
    step = max(ALIGNMENT, (1 << (size.bit_length() - 1)) // 8)
    return -(-size // step) * step


class Store(ABC):
    """Slots of one rank."""

    def __init__(self, limit: int | None):
        self.limit, self.total = limit, 0
        self._free: dict[int, list[Slot]] = {}
        self._returned: deque[Slot] = deque()  # appended to by any thread, finalizers included, so without a lock

    def allocate(self, size: int) -> Slot | None:
        """Room for ``size`` bytes; None beyond the limit."""
        with contextlib.suppress(IndexError):
            while True:
                slot = self._returned.popleft()
                self._free.setdefault(slot.size, []).append(slot)
        room = room_for(size)
        if free := self._free.get(room):
            return free.pop()
        if self.limit is not None and self.total + room > self.limit:
            return None
        slot = Slot(room, self._new(room))
        self.total += room
        return slot

    def free(self, slot: Slot) -> None:
        """What it held is not needed any more."""
        self._returned.append(slot)

    @abstractmethod
    def _new(self, room: int) -> Any:
        """The place of a further slot."""

    @abstractmethod
    def put(self, slot: Slot, source: Tensor) -> None:
        """Copy ``source`` (bytes, on the device) out; OSError where the disk does not take it."""

    @abstractmethod
    def get(self, slot: Slot, target: Tensor) -> None:
        """Copy back; RuntimeError where it is not what was written."""


def _fill(target: np.ndarray, source: Tensor) -> None:
    if source.device.type == "cpu":
        target[:] = source.numpy()  # one thread, without the interpreter's lock: torch would start threads that compete with training
    else:
        torch.from_numpy(target).copy_(source)


def _empty(target: Tensor, source: np.ndarray) -> None:
    if target.device.type == "cpu":
        target.numpy()[:] = source
    else:
        target.copy_(torch.from_numpy(source))


class HostStore(Store):
    """Pinned host memory; ordinary memory in CPU runs."""

    def _new(self, room: int) -> Tensor:
        accelerator, buffer = get_accelerator(), torch.empty(room, dtype=torch.uint8)
        return buffer if accelerator.device_name() == "cpu" else accelerator.pin_memory(buffer)

    def put(self, slot: Slot, source: Tensor) -> None:
        """As :class:`Store`."""
        if source.device.type == "cpu":
            _fill(slot.place.numpy()[: source.numel()], source)
        else:
            slot.place[: source.numel()].copy_(source)

    def get(self, slot: Slot, target: Tensor) -> None:
        """As :class:`Store`."""
        if target.device.type == "cpu":
            _empty(target, slot.place.numpy()[: target.numel()])
        else:
            target.copy_(slot.place[: target.numel()])


class DiskStore(Store):
    """One file, unlinked as soon as it is open: it ends with the process, however that ends. O_DIRECT where the file system has it, so
    that what goes out does not fill host memory as page cache."""

    def __init__(self, folder: str | Path, limit: int | None = None):
        super().__init__(limit)
        self.path = Path(folder) / f"{socket.gethostname()}-{os.getpid()}-{next(_counter)}{SUFFIX}"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clean(self.path.parent)
            self.descriptor = _open(self.path)
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"megastab.parallel.activation_offload.folder = {folder} cannot be used ({error.strerror}): name a folder on a local disk "
                f"that this user may write to."
            ) from error
        self._own = threading.local()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def _new(self, room: int) -> int:
        return self.total

    def _buffer(self) -> np.ndarray:
        """This thread's, aligned as O_DIRECT asks."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = _aligned_buffer()
        buffer: np.ndarray = self._own.buffer
        return buffer

    def put(self, slot: Slot, source: Tensor) -> None:
        """As :class:`Store`."""
        buffer, slot.sums = self._buffer(), []
        for start in range(0, source.numel(), CHUNK):
            piece = source[start : start + CHUNK]
            block = buffer[: -(-piece.numel() // ALIGNMENT) * ALIGNMENT]
            _fill(buffer[: piece.numel()], piece)
            slot.sums.append(_sum(block))
            if os.pwrite(self.descriptor, block.data, slot.place + start) != len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def get(self, slot: Slot, target: Tensor) -> None:
        """As :class:`Store`."""
        buffer = self._buffer()
        for start, expected in zip(range(0, target.numel(), CHUNK), slot.sums, strict=True):
            piece = target[start : start + CHUNK]
            block = buffer[: -(-piece.numel() // ALIGNMENT) * ALIGNMENT]
            try:
                num_read = os.preadv(self.descriptor, [block.data], slot.place + start)
            except OSError as error:
                raise self._damaged(slot, start, str(error.strerror)) from error
            if num_read != len(block):
                raise self._damaged(slot, start, f"{num_read} of {len(block)} bytes could be read")
            if _sum(block) != expected:
                raise self._damaged(slot, start, "what was read is not what was written")
            _empty(piece, buffer[: piece.numel()])

    def _damaged(self, slot: Slot, start: int, what: str) -> RuntimeError:
        return RuntimeError(
            f"offloaded activations: {self.path} (unlinked while open) at byte {slot.place + start}: {what}. The step is lost; check the "
            f"disk, or set megastab.parallel.activation_offload.folder to another one."
        )


def clean(folder: Path) -> None:
    """Remove names that killed processes left in the instant before they unlinked them; a living process has its file open."""
    for left in folder.glob(f"*{SUFFIX}"):
        left.unlink(missing_ok=True)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o600)  # a file system without O_DIRECT


def _aligned_buffer() -> np.ndarray:
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        pinned: np.ndarray = accelerator.pin_memory(torch.empty(CHUNK, dtype=torch.uint8)).numpy()
        if pinned.ctypes.data % ALIGNMENT == 0:
            return pinned
    return np.frombuffer(mmap.mmap(-1, CHUNK), dtype=np.uint8)


def _sum(block: np.ndarray) -> int:
    return int(np.add.reduce(block.view(np.uint64)))
