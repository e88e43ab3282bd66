"""Which optimizer wrapper DeepSpeed will choose. Imports nothing, so that the plan can ask without DeepSpeed."""

from __future__ import annotations


def wrapper_name(precision: str, zero_stage: int, offload: bool = False) -> str:
    """The wrapper's class (the table in DeepSpeed 0.19.8's ``_do_optimizer_sanity_check``)."""
    if zero_stage == 0:
        return "none (torch optimizer)" if precision == "fp32" else "FP16_Optimizer"
    if precision == "bf16" and zero_stage == 1 and not offload:
        return "BF16_Optimizer"
    return "DeepSpeedZeroOptimizer_Stage3" if zero_stage == 3 else f"DeepSpeedZeroOptimizer (stage {zero_stage})"
