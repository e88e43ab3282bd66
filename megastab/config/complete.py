"""DeepSpeed keys whose default is a trap: written out, each with its reason, wherever the user wrote none.

A value the user wrote is never changed; a bad one is an error (``refusals.py``). The one exception, announced like the rest, is
the ZeRO stage of a 16-bit run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastab.config.schema import Megastab
from megastab.config.settings import offload_device, precision_of, read, stage_of, write


@dataclass(frozen=True)
class Completion:
    """One key the loader wrote: dotted path, value, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Trap:
    """A DeepSpeed key, when it must not be left to its default, and what to write instead."""

    key: str
    reason: str
    condition: str
    applies: Callable[[dict[str, Any], Megastab], bool]
    value: Callable[[dict[str, Any], Megastab], Any]


def complete(deepspeed: dict[str, Any], megastab: Megastab) -> tuple[dict[str, Any], tuple[Completion, ...]]:
    """A completed copy of ``deepspeed`` and what was written into it, in order."""
    completed = copy.deepcopy(deepspeed)
    written = [*_promote(completed)]
    for trap in TRAPS:
        if read(completed, trap.key) is None and trap.applies(completed, megastab):
            value = trap.value(completed, megastab)
            write(completed, trap.key, value)
            written.append(Completion(trap.key, value, trap.reason))
    return completed, tuple(written)


ACCELERATOR_BUCKET = 50_000_000
"""Elements that gradients are reduced by where nobody says otherwise, but on a CPU."""

PROMOTION_REASON = (
    "16-bit weights without ZeRO would run under DeepSpeed's FP16_Optimizer, whose norm is wrong under tensor parallelism and whose "
    "fp16 gradients are too small by the loss scale; stage 1 costs nothing at one data-parallel rank and saves memory at more"
)


def _promote(deepspeed: dict[str, Any]) -> list[Completion]:
    if precision_of(deepspeed) == "fp32" or stage_of(deepspeed) > 0:
        return []
    write(deepspeed, "zero_optimization.stage", 1)
    return [Completion("zero_optimization.stage", 1, PROMOTION_REASON)]


def is_cpu_run() -> bool:
    """Whether this machine will train on its processor, as far as can be told without importing torch.

    It only chooses a buffer size, so that a wrong guess costs memory or a few more collectives, never a result.
    """
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen is not None:
        return chosen == "cpu"
    return not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def _always(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return True


def _zero(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return stage_of(deepspeed) > 0


def _low_precision(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return precision_of(deepspeed) != "fp32"


def _bf16(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return precision_of(deepspeed) == "bf16"


def _offloaded(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return offload_device(deepspeed, "optimizer") != "none"


def _lacks_path(section: str) -> Callable[[dict[str, Any], Megastab], bool]:
    return lambda deepspeed, megastab: bool(read(deepspeed, f"{section}.enabled")) and read(deepspeed, f"{section}.output_path") is None


def _folder(section: str) -> Callable[[dict[str, Any], Megastab], str]:
    """DeepSpeed writes to output_path/job_name: the run folder itself under our job name, a subfolder of it under the user's."""

    def folder(deepspeed: dict[str, Any], megastab: Megastab) -> str:
        job = read(deepspeed, f"{section}.job_name")
        return megastab.run.dir if job in ("tensorboard", "csv") else f"{megastab.run.dir}/{section}"

    return folder


def sends_slices(megastab: Megastab) -> bool:
    """Whether what travels between pipeline stages is already a slice of the sequence."""
    return megastab.parallel.sequence and megastab.parallel.tensor > 1 and megastab.parallel.pipeline > 1


def _sends_slices(deepspeed: dict[str, Any], megastab: Megastab) -> bool:
    return sends_slices(megastab)


def _just(value: Any) -> Callable[[dict[str, Any], Megastab], Any]:
    return lambda deepspeed, megastab: value


def _bucket(deepspeed: dict[str, Any], megastab: Megastab) -> int:
    return 5_000_000 if is_cpu_run() else ACCELERATOR_BUCKET


_SLICED = "under sequence parallelism the payload is already a slice; DeepSpeed would cut it again and mix the slices of different ranks"
_INTO_RUN_FOLDER = "without a path the files land under the working directory, where the next run mixes with them"

TRAPS: tuple[Trap, ...] = (
    Trap(
        "gradient_clipping",
        "when it is missing DeepSpeed clips at 1.0 all the same; written so that the run says so, and as 0 (no cap) beside ZClip, which "
        "a cap below the usual norm would leave nothing to do",
        "always",
        _always,
        lambda deepspeed, megastab: 1.0 if megastab.stability.clipping is None else 0.0,
    ),
    Trap(
        "zero_allow_untested_optimizer",
        "megastab builds the optimizer itself, and DeepSpeed asserts on a class it does not list",
        "ZeRO",
        _zero,
        _just(True),
    ),
    Trap(
        "zero_force_ds_cpu_optimizer",
        "the default refuses every offloaded optimizer but DeepSpeed's own, which compiles for minutes",
        "offload_optimizer",
        _offloaded,
        _just(False),
    ),
    Trap(
        "data_types.grad_accum_dtype",
        "the gradients of micro-batches are summed in fp32; the default sums them in 16 bits",
        "bf16 or fp16",
        _low_precision,
        _just("fp32"),
    ),
    Trap(
        "communication_data_type",
        "the default casts gradients, fp32 sums included, to 16 bits for the all-reduce",
        "bf16 or fp16",
        _low_precision,
        _just("fp32"),
    ),
    Trap(
        "bf16.check_grad_overflow",
        "without the check one non-finite gradient makes every weight NaN under ZeRO 1 and 2",
        "bf16",
        _bf16,
        _just(True),
    ),
    Trap(
        "zero_optimization.reduce_bucket_size",
        "the default of 5e8 elements is a buffer of 1 to 2 GB per rank, allocated in every backward",
        "ZeRO",
        _zero,
        _bucket,
    ),
    Trap(
        "timers.throughput.enabled",
        "the default synchronises the device around every micro-batch; megastab measures throughput itself",
        "always",
        _always,
        _just(False),
    ),
    Trap(
        "steps_per_print",
        "null makes the pipeline engine keep one timer record per step for ever; every 1000 steps one line empties the list",
        "always",
        _always,
        _just(1000),
    ),
    Trap("pipeline.pipe_partitioned", _SLICED, "sequence, tensor > 1 and pipeline > 1", _sends_slices, _just(False)),
    Trap("pipeline.grad_partitioned", _SLICED, "sequence, tensor > 1 and pipeline > 1", _sends_slices, _just(False)),
    # job_name comes first: it applies only while the path is still missing.
    Trap("tensorboard.job_name", _INTO_RUN_FOLDER, "tensorboard, no path", _lacks_path("tensorboard"), _just("tensorboard")),
    Trap("tensorboard.output_path", _INTO_RUN_FOLDER, "tensorboard, no path", _lacks_path("tensorboard"), _folder("tensorboard")),
    Trap("csv_monitor.job_name", _INTO_RUN_FOLDER, "csv_monitor, no path", _lacks_path("csv_monitor"), _just("csv")),
    Trap("csv_monitor.output_path", _INTO_RUN_FOLDER, "csv_monitor, no path", _lacks_path("csv_monitor"), _folder("csv_monitor")),
)
