"""The machine a table was taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def facts(threads: int) -> dict[str, str]:
    """What a figure depends on. The load is that of the moment the bench starts: above 0.5, the figures are noisy."""
    import torch

    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    yes = {key: "yes" if able.get(key) else "no" for key in ("amx_bf16", "avx512_bf16", "avx512_f")}
    return {
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))}, {threads} threads used",
        "bf16 units (torch)": f"AMX {yes['amx_bf16']}, AVX512-BF16 {yes['avx512_bf16']}, AVX512 {yes['avx512_f']}",
        "device": os.environ.get("DS_ACCELERATOR", "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "load at the start": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()
