"""DeepSpeed's collectives counted among this process's waits, and where its stream waits for DeepSpeed's other ones.

Relies on ``deepspeed.comm.comm.cdb``, the one object every collective of DeepSpeed goes through, and where communication overlaps with
backward on a stream of its own (``overlap_comm``) on the wrapper's ``independent_gradient_partition_epilogue``, which ends when the
reductions have, and on ZeRO-3's ``parameter_offload.get_param_coordinator().fetch_sub_module``, which ends when the step's stream may
read the gathered weights.
"""

from __future__ import annotations

from typing import Any

from deepspeed.comm import comm

from megastab.parallel import collectives
from megastab.parallel.waiting import Counted, HostClock, Waiting


def count_waiting(engine: Any, waiting: Waiting) -> None:
    """Count what this process waits for in collectives, DeepSpeed's and ours, from now on."""
    collectives.count_waiting(waiting)
    backend = comm.cdb.calls if isinstance(comm.cdb, Counted) else comm.cdb
    comm.cdb = Counted(backend, waiting)
    if not isinstance(waiting.clock, HostClock) and engine.zero_overlap_comm():
        _count_side_streams(engine.optimizer, waiting)


def _count_side_streams(optimizer: Any, waiting: Waiting) -> None:
    name = "independent_gradient_partition_epilogue"
    if hasattr(optimizer, name):
        setattr(optimizer, name, waiting.counting(getattr(optimizer, name)))
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is not None:
        coordinator = offload.get_param_coordinator()
        coordinator.fetch_sub_module = waiting.counting(coordinator.fetch_sub_module)


def stop_counting() -> None:
    """DeepSpeed's collectives and ours as they were."""
    collectives.count_waiting(None)
    if isinstance(comm.cdb, Counted):
        comm.cdb = comm.cdb.calls
