"""The machines a plan is made for: presets by name, or a JSON file with the same keys."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError
from megastab.config.nearest import did_you_mean
from megastab.config.source import parse_json

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs. Links are what one GPU sends one way."""

    nodes: int
    gpus_per_node: int
    memory_gb: float
    """GiB of one GPU."""
    peak_tflops: dict[str, float]
    """Dense, by precision of the weights."""
    intra_gbps: float
    """Gigabits a second inside a node."""
    inter_gbps: float
    """Gigabits a second between nodes."""
    efficiency: float = 0.5
    """Share of the peak at which the model's products and what lies between them run, nothing else in the way."""
    host_gb_per_s: float = 25.0
    """10^9 bytes a second that one GPU moves to pinned host memory, and as many back at the same time."""
    disk_gb_per_s: float = 3.0
    """10^9 bytes a second that one GPU's share of the node's local disks takes, and gives back."""

    @property
    def world(self) -> int:
        """GPUs of the cluster."""
        return self.nodes * self.gpus_per_node


# Memory: what is left of the nominal size for a process (nvidia-smi's total, in GiB). Peaks are dense; fp32 is without TF32, as torch
# multiplies by default. NVLink's figures on datasheets count both directions. Host: four fifths of PCIe x16 (63 GB/s a way of 5.0, 31.5 of
# 4.0). Disk: these systems have one NVMe disk of 3.84 TB a GPU; what it takes for long is assumed, and it gives more than it takes.
PRESETS: dict[str, Cluster] = {
    # NVIDIA H100 datasheet, SXM5: 989 TFLOP/s of 16-bit, 67 of fp32, NVLink 900 GB/s both ways; DGX H100: 8 GPUs, 400 Gb/s each.
    "h100": Cluster(1, 8, 79.0, {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}, 3600.0, 400.0, host_gb_per_s=50.0),
    # NVIDIA H200 datasheet, SXM: 141 GB, otherwise as H100; DGX H200.
    "h200": Cluster(1, 8, 140.0, {"bf16": 989.0, "fp16": 989.0, "fp32": 67.0}, 3600.0, 400.0, host_gb_per_s=50.0),
    # NVIDIA A100 datasheet, 80 GB SXM: 312 TFLOP/s, 19.5 of fp32, NVLink 600 GB/s both ways; DGX A100: 8 GPUs, 200 Gb/s each.
    "a100-80": Cluster(1, 8, 79.0, {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}, 2400.0, 200.0),
}
# Measured per core on a two-core AMX machine (torch 2.13): products of 1024 x 1024, and a gloo all-reduce of 8 MB in 11.4 ms.
CPU_TFLOPS = {"bf16": 0.44, "fp16": 0.126, "fp32": 0.11}
CPU_GBPS = 5.9
CPU_DISK_GB_PER_S = 1.5  # of the whole machine, through O_DIRECT, summed and copied (docs/offload.md)


def cluster_named(name: str, nodes: int | None = None) -> Cluster:
    """A preset, or the JSON file ``name``; with ``nodes`` that many of them.

    Raises:
        UserError: no such preset and no such file, or a key that is missing, unknown or of a wrong value.
    """
    if name == "this-cpu":
        found = this_cpu()
    elif name in PRESETS:
        found = PRESETS[name]
    elif Path(name).is_file():
        found = _from_file(Path(name))
    else:
        names = [*PRESETS, "this-cpu"]
        raise UserError(f"--cluster {name}: neither a file nor one of {', '.join(names)}.{did_you_mean(name, names)}")
    if nodes is None:
        return found
    if nodes < 1:
        raise UserError(f"--nodes {nodes} must be 1 or more.")
    return replace(found, nodes=nodes)


def this_cpu() -> Cluster:
    """One rank a core of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = CPU_DISK_GB_PER_S / cores
    return Cluster(1, cores, memory / cores, dict(CPU_TFLOPS), CPU_GBPS, CPU_GBPS, disk_gb_per_s=disk)


def _from_file(path: Path) -> Cluster:
    try:
        written = parse_json(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from None
    known, given = [field.name for field in fields(Cluster)], [field.name for field in fields(Cluster) if field.default is not MISSING]
    problems = [f"{key} is no key of a cluster.{did_you_mean(key, known)}" for key in written if key not in known]
    problems += [f"{key} is missing." for key in known if key not in written and key not in given]
    problems += [said for key, value in written.items() if key in known and (said := _wrong(key, value))]
    if problems:
        raise UserError("\n  ".join([f"{path} cannot be used:", *problems]))
    return Cluster(**written)


def _wrong(key: str, value: Any) -> str:
    """What is wrong with a value; empty if nothing."""
    if key == "peak_tflops":
        if not isinstance(value, dict) or not value:
            return f'{key} = {value!r} must be an object such as {{"bf16": 989}}.'
        bad = {name: peak for name, peak in value.items() if name not in PRECISIONS or not _is_positive(peak)}
        return f"{key} = {bad!r}: keys are {', '.join(PRECISIONS)}, values TFLOP/s above 0." if bad else ""
    if not _is_positive(value):
        return f"{key} = {value!r} must be a number above 0."
    if key in ("nodes", "gpus_per_node") and not isinstance(value, int):
        return f"{key} = {value!r} must be a whole number."
    return f"{key} = {value!r} is a share of the peak: at most 1." if key == "efficiency" and value > 1 else ""


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
