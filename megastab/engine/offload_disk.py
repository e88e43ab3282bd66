"""A file without a name for what is offloaded, written and read past the page cache.

Bytes in host memory take the shortest way: the disk reads and writes the tensor's own pages, and no processor copies them. O_DIRECT wants
addresses and lengths that are multiples of a block, so the ragged ends of a tensor (less than a page each) travel in pages of their own,
in the same request, and what comes back lies at an address of the same phase. Bytes of an accelerator go through a pinned buffer.

A request carries the sum of the first 64-bit word of every sector, which is compared when it is read: a sector is what a disk writes or
does not write, so whatever is lost, torn, stale or elsewhere shows, at an eighth of the time of reading every word. Bits that flip inside
a sector are the drive's own code's to find.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megastab.config.errors import UserError
from megastab.engine.offload_store import ALIGNMENT, Slot, Store

CHUNK = 4 << 20  # bytes of one request, but for the ends, and of each thread's pinned buffer
SECTOR_WORDS = 512 // 8
SUFFIX = ".activations"
_counter = itertools.count()


class DiskStore(Store):
    """One file, unlinked as soon as it is open: it ends with the process, however that ends. O_DIRECT where the file system has it, so
    that what goes out does not fill host memory as page cache."""

    margin = 2 * ALIGNMENT

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

    def target(self, slot: Slot, size: int, device: torch.device) -> Tensor:
        """As :class:`Store`: in host memory at an address of the source's phase."""
        if not self._is_direct(device):
            return super().target(slot, size, device)
        room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        shift = (slot.phase - room.data_ptr()) % ALIGNMENT
        return room[shift : shift + size]

    def put(self, slot: Slot, source: Tensor) -> None:
        """As :class:`Store`."""
        slot.phase, slot.sums, place = source.data_ptr() % ALIGNMENT, [], slot.place
        for parts in self._outgoing(source):
            slot.sums.append(_sum(parts))
            size = sum(map(len, parts))
            if os.pwritev(self.descriptor, [part.data for part in parts], place) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            place += size

    def get(self, slot: Slot, target: Tensor) -> None:
        """As :class:`Store`."""
        place = slot.place
        for parts, expected in zip(self._incoming(target), slot.sums, strict=True):
            size = sum(map(len, parts))
            try:
                num_read = os.preadv(self.descriptor, [part.data for part in parts], place)
            except OSError as error:
                raise self._damaged(place, str(error.strerror)) from error
            if num_read != size:
                raise self._damaged(place, f"{num_read} of {size} bytes could be read")
            if _sum(parts) != expected:
                raise self._damaged(place, "what was read is not what was written")
            place += size

    def _outgoing(self, source: Tensor) -> Iterator[list[np.ndarray]]:
        """What each request writes; a request is done when the next is asked for."""
        if self._is_direct(source.device):
            head, middle, tail = _cut(source)
            first, last = self._ends()
            first[: len(head)], last[: len(tail)] = head, tail
            yield from _requests(first, middle, last)
            return
        for piece, block in self._staged(source):
            torch.from_numpy(block[: piece.numel()]).copy_(piece)
            yield [block]

    def _incoming(self, target: Tensor) -> Iterator[list[np.ndarray]]:
        """Where each request reads to; a request is done, and right, when the next is asked for."""
        if self._is_direct(target.device):
            head, middle, tail = _cut(target)
            first, last = self._ends()
            yield from _requests(first, middle, last)
            head[:], tail[:] = first[: len(head)], last[: len(tail)]
            return
        for piece, block in self._staged(target):
            yield [block]
            piece.copy_(torch.from_numpy(block[: piece.numel()]))

    def _is_direct(self, device: torch.device) -> bool:
        """Whether the disk reaches this memory without a buffer between."""
        return device.type == "cpu"

    def _ends(self) -> np.ndarray:
        """Two pages of this thread's."""
        if not hasattr(self._own, "ends"):
            self._own.ends = _pages(2 * ALIGNMENT).reshape(2, ALIGNMENT)
        ends: np.ndarray = self._own.ends
        return ends

    def _staged(self, tensor: Tensor) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Pieces of ``tensor``, each with the start of this thread's pinned buffer, in whole pages."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = _pinned_buffer()
        for piece in tensor.split(CHUNK):
            yield piece, self._own.buffer[: -(-piece.numel() // ALIGNMENT) * ALIGNMENT]

    def _damaged(self, place: int, what: str) -> RuntimeError:
        return RuntimeError(
            f"offloaded activations: {self.path} (unlinked while open) at byte {place}: {what}. The step is lost; check the "
            f"disk, or set megastab.parallel.activation_offload.folder to another one."
        )


def _cut(tensor: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole pages of ``tensor``, and the bytes before and after them."""
    array, head = tensor.numpy(), min(-tensor.data_ptr() % ALIGNMENT, tensor.numel())
    end = len(array) - (len(array) - head) % ALIGNMENT
    return array[:head], array[head:end], array[end:]


def _requests(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> Iterator[list[np.ndarray]]:
    """The first page and the last one beside their neighbours."""
    starts = range(0, len(middle), CHUNK) or range(1)
    for start in starts:
        before, after = [first] if start == 0 else [], [last] if start == starts[-1] else []
        yield [*before, middle[start : start + CHUNK], *after]


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


def _pages(size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def _pinned_buffer() -> np.ndarray:
    pinned: np.ndarray = get_accelerator().pin_memory(torch.empty(CHUNK, dtype=torch.uint8)).numpy()
    return pinned if pinned.ctypes.data % ALIGNMENT == 0 else _pages(CHUNK)


def _sum(parts: list[np.ndarray]) -> int:
    return sum(int(np.add.reduce(part.view(np.uint64)[::SECTOR_WORDS])) for part in parts)
