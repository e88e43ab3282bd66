"""Reading DeepSpeed's part of the config: values by dotted path, and the few facts everything else is derived from."""

from __future__ import annotations

import copy
from typing import Any


def read(deepspeed: dict[str, Any], path: str, default: Any = None) -> Any:
    """The value at ``a.b.c``; ``default`` where it, or a section on the way, is absent or null."""
    value: Any = deepspeed
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value


def write(deepspeed: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in place, making the sections on the way."""
    *sections, last = path.split(".")
    for key in sections:
        if deepspeed.get(key) is None:
            deepspeed[key] = {}
        deepspeed = deepspeed[key]
    deepspeed[last] = value


def without_nulls(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """A copy without the keys set to null: null means absent, and parts of DeepSpeed cannot read it."""
    kept = {key: value for key, value in deepspeed.items() if value is not None}
    return {key: without_nulls(value) if isinstance(value, dict) else copy.deepcopy(value) for key, value in kept.items()}


def precision_of(deepspeed: dict[str, Any]) -> str:
    """``bf16``, ``fp16`` or ``fp32``."""
    for name in ("bf16", "fp16"):
        if read(deepspeed, f"{name}.enabled", False):
            return name
    return "fp32"


def stage_of(deepspeed: dict[str, Any]) -> int:
    """The ZeRO stage; 0 when none is given."""
    return int(read(deepspeed, "zero_optimization.stage", 0))


def offload_device(deepspeed: dict[str, Any], what: str) -> str:
    """Where ``what`` (``optimizer`` or ``param``) is offloaded to: ``none``, ``cpu`` or ``nvme``."""
    return str(read(deepspeed, f"zero_optimization.offload_{what}.device", "none"))
