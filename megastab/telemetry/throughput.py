"""Rates: tokens, model FLOPs and their share of the device's peak, and memory."""

from __future__ import annotations

import os
import resource

from deepspeed.accelerator import get_accelerator

# Dense bf16 peak of one device, TFLOP/s, from the vendors' data sheets (no sparsity). The first name found in the device's wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
    "A10": 125.0,
}


def peak_tflops() -> float | None:
    """Peak of this rank's device; None where it is not known (set MEGASTAB_PEAK_TFLOPS to tell)."""
    told = os.environ.get("MEGASTAB_PEAK_TFLOPS")
    if told:
        return float(told)
    accelerator = get_accelerator()
    name = accelerator.get_device_name() if hasattr(accelerator, "get_device_name") else ""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key.lower() in str(name).lower()), None)


def peak_memory_gb() -> float:
    """Largest memory this process has held: on the device, or resident where the device is the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return float(accelerator.max_memory_allocated()) / 1e9


def rates(tokens: int, seconds: float, flops_per_token: float, ranks: int) -> dict[str, float]:
    """Throughput of one step, by tag key."""
    per_second = tokens / max(seconds, 1e-9)
    tflops = per_second * flops_per_token / ranks / 1e12
    out = {"tokens_per_second": per_second, "model_tflops": tflops}
    peak = peak_tflops()
    if peak:
        out["mfu"] = tflops / peak
    return out
