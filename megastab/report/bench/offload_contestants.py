"""One engine with or without activation offload: its steps, and the memory a step adds at its peak."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

from deepspeed.accelerator import get_accelerator

from megastab.report.bench.cases import Spec
from megastab.report.bench.contestants import Contestants

_M_MMAP_THRESHOLD = -3  # malloc.h
_MAPPED_FROM = 128 << 10  # bytes; larger blocks then go back to the system as soon as they are freed


class OffloadContestants(Contestants):
    """Ours alone."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        assert self.ours is not None
        self.offload = self.ours.built.offload

    def facts(self) -> dict[str, float]:
        """Bytes a step adds at its peak, and what the offloader has seen; the step is slower than others in CPU runs."""
        found = {"grown": self._grown()}
        if self.offload is not None:
            mover = self.offload.mover
            found |= {"out_rate": mover.out_rate.bytes_per_second, "in_rate": mover.in_rate.bytes_per_second, **vars(mover.counts)}
        return found

    def _grown(self) -> float:
        accelerator = get_accelerator()
        gc.collect()
        if accelerator.device_name() != "cpu":
            accelerator.reset_peak_memory_stats()
            before = accelerator.memory_allocated()
            self.step()
            return float(accelerator.max_memory_allocated() - before)
        libc: Any = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before = _status("VmRSS")
        self.step()
        return float(_status("VmHWM") - before)


def _status(key: str) -> int:
    """Bytes of one line of the process's status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
