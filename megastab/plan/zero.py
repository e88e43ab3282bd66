"""What a config tells DeepSpeed about ZeRO, and which wrapper answers to it."""

from __future__ import annotations

from megastab.config.config import Config
from megastab.config.settings import offload_device, read
from megastab.plan.parameters import Weight

FP32 = 4


def wrapper_kind(config: Config) -> str:
    """``plain``, ``bf16``, ``zero1``, ``zero2`` or ``zero3``: which row of the table."""
    offloads = offload_device(config.deepspeed, "optimizer") != "none"
    if config.precision == "bf16" and config.zero_stage == 1 and not offloads:
        return "bf16"
    return ("plain", "zero1", "zero2", "zero3")[config.zero_stage]


def weight_bytes(config: Config) -> int:
    """Bytes of a weight as the layers use it."""
    return FP32 if config.precision == "fp32" else 2


def kept_whole(config: Config, weights: tuple[Weight, ...]) -> list[Weight]:
    """The parameters ZeRO 3 never releases: the smallest ones, until the model's limit is reached."""
    limit = zero_setting(config, "param_persistence_threshold", 100_000)
    model_limit = zero_setting(config, "model_persistence_threshold", 2**63 - 1)
    kept, total = [], 0
    for weight in weights:
        if weight.elements <= limit and total + weight.elements <= model_limit:
            kept.append(weight)
            total += weight.elements
    return kept


def bucket_elements(config: Config) -> int:
    """Elements ZeRO reduces at once."""
    return int(zero_setting(config, "reduce_bucket_size", 500_000_000))


def overlaps(config: Config) -> bool:
    """Whether ZeRO reduces gradients while backward goes on (by default at stage 3 alone)."""
    return bool(zero_setting(config, "overlap_comm", config.zero_stage == 3))


def zero_setting(config: Config, key: str, default: float) -> float:
    """A ZeRO setting, under its own name or its ``stage3_`` alias."""
    aliased = read(config.deepspeed, f"zero_optimization.stage3_{key}")
    return aliased if aliased is not None else read(config.deepspeed, f"zero_optimization.{key}", default)
