"""The accelerator's part of offloading: side streams for copies, and marks in the work of the compute stream.

In CPU runs work is done when its call returns: a mark is a time, and threads copy without streams.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator


class Lane:
    """Streams of the worker threads, one each."""

    def __init__(self) -> None:
        self.accelerator = get_accelerator()
        self.has_streams = self.accelerator.device_name() != "cpu"
        self.device_index = self.accelerator.current_device() if self.has_streams else 0
        self._own = threading.local()

    def mark(self) -> Any:
        """A point in the compute stream's work; its time in CPU runs."""
        if not self.has_streams:
            return time.perf_counter()
        event = self.accelerator.Event(enable_timing=True)
        event.record()
        return event

    def moment(self) -> Any:
        """A point to wait for, without its time; None in CPU runs."""
        if not self.has_streams:
            return None
        event = self.accelerator.Event()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two marks; None while the device has not passed the second."""
        if not self.has_streams:
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else None

    def enter_thread(self) -> None:
        """At the start of a worker: a new thread would use the first device."""
        if self.has_streams:
            self.accelerator.set_device(self.device_index)
            self._own.stream = self.accelerator.Stream()

    @contextlib.contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """In a worker: what is inside runs on its own stream, once the compute stream has passed ``mark``."""
        if not self.has_streams:
            yield
            return
        self._own.stream.wait_event(mark)
        with self.accelerator.stream(self._own.stream):
            yield
        self._own.stream.synchronize()
