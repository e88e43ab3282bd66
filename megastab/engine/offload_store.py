"""Where offloaded activations lie: slots, and pinned host memory to hold them.

Slots are of few sizes (at most an eighth above what they hold) and are used again, so that a run soon stops growing. Main-thread code
allocates, any thread frees.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

ALIGNMENT = 4096  # of rooms


@dataclass
class Slot:
    """Room for one storage."""

    size: int
    """Of the room, not of what it holds."""
    place: Any
    """An offset in the file, or a tensor of bytes."""
    phase: int = 0
    """Of the address it was written from, modulo the alignment, which the address it is read to has to share."""
    sums: list[int] = field(default_factory=list)
    """Of each request that wrote it."""


def room_for(size: int) -> int:
    """``size`` rounded up to a slot's: eight sizes between a power of two and the next, multiples of the alignment."""
    step = max(ALIGNMENT, (1 << (size.bit_length() - 1)) // 8)
    return -(-size // step) * step


class Store(ABC):
    """Slots of one rank."""

    margin = 0
    """Bytes a slot needs beyond what it holds."""

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
        room = room_for(size + self.margin)
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

    def target(self, slot: Slot, size: int, device: torch.device) -> Tensor:
        """Memory for the ``size`` bytes of ``slot``, as :meth:`get` wants it."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    @abstractmethod
    def put(self, slot: Slot, source: Tensor) -> None:
        """Copy ``source`` (bytes, on the device) out; OSError where the disk does not take it."""

    @abstractmethod
    def get(self, slot: Slot, target: Tensor) -> None:
        """Copy back; RuntimeError where it is not what was written."""


class HostStore(Store):
    """Pinned host memory; ordinary memory in CPU runs."""

    def _new(self, room: int) -> Tensor:
        accelerator, buffer = get_accelerator(), torch.empty(room, dtype=torch.uint8)
        return buffer if accelerator.device_name() == "cpu" else accelerator.pin_memory(buffer)

    def put(self, slot: Slot, source: Tensor) -> None:
        """As :class:`Store`."""
        if source.device.type == "cpu":
            slot.place.numpy()[: source.numel()] = source.numpy()  # torch would start threads that compete with training
        else:
            slot.place[: source.numel()].copy_(source)

    def get(self, slot: Slot, target: Tensor) -> None:
        """As :class:`Store`."""
        if target.device.type == "cpu":
            target.numpy()[:] = slot.place.numpy()[: target.numel()]
        else:
            target.copy_(slot.place[: target.numel()])
