"""DeepSpeed settings that are legal there and wrong here: each with the reason and what to write instead."""

from __future__ import annotations

import json
from typing import Any

from megastab.config.complete import sends_slices
from megastab.config.schema import Megastab
from megastab.config.settings import offload_device, precision_of, read, stage_of

# Whole sections and keys that somebody else's feature reads -> why not, and what to use.
REFUSED: dict[str, str] = {
    "activation_checkpointing": "recompute has one mechanism for both engines: use megastab.parallel.recompute.",
    "autotuning": "it launches runs of its own: use the plan (tools/plan.py) to choose a layout.",
    "bfloat16": 'it is the old name of "bf16": write "bf16".',
    "compile": "DeepSpeed's own compiler replaces hooks megastab relies on: use megastab.run.compile.",
    "data_efficiency": "curricula and routing change the data order, which is a function of (seed, epoch, blend) only: leave it out.",
    "data_parallel_size": "it is world / (tensor x pipeline): use megastab.parallel.",
    "expert_parallel": "there are no experts in these models: leave it out.",
    "hybrid_engine": "it serves generation inside reinforcement learning: leave it out.",
    "scheduler": "the schedule counts applied steps and is saved with the run: use megastab.schedule.",
    "sequence_parallel_size": "sequence parallelism splits over the tensor-parallel ranks: use megastab.parallel.sequence.",
    "tensor_parallel": "AutoTP rewrites plain models and knows no pipeline: use megastab.parallel.tensor.",
    "weight_quantization": "it quantises weights for inference: leave it out.",
    "pipeline.activation_checkpoint_interval": "use megastab.parallel.recompute.",
    "pipeline.stages": "use megastab.parallel.pipeline.",
    "zero_optimization.cpu_offload": 'write zero_optimization.offload_optimizer = {"device": "cpu"}.',
    "zero_optimization.cpu_offload_param": 'write zero_optimization.offload_param = {"device": "cpu"}.',
    "zero_optimization.cpu_offload_use_pin_memory": "write zero_optimization.offload_optimizer.pin_memory.",
    "zero_optimization.zenflow": "it replaces the optimizer wrapper, and with it the masters and norms megastab watches: leave it out.",
}

# Single values that are wrong -> why, and what to write. A key the loader completes stands here with the value it must not have.
REFUSED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("managed_gradient_accumulation", False, "the trainer counts micro-batches as DeepSpeed does: leave it out."),
    ("gradient_allreduce_op", "sum", "the loss is already divided by the tokens of the whole step: leave it out."),
    ("zero_optimization.round_robin_gradients", True, "it makes DeepSpeed's map from parameters to fp32 masters wrong: leave it out."),
    ("zero_optimization.compute_grad_norm", False, "clipping and every stability method need the norm: leave it out."),
    ("zero_optimization.offload_optimizer.super_offload", True, "it replaces the optimizer wrapper: leave it out."),
    ("bf16.bf16_master_weights_and_grads", True, "masters and gradient sums are fp32 here: leave it out."),
    ("bf16.bf16_optimizer_states", True, "optimizer states are fp32 here: leave it out."),
    ("fp16.fp16_master_weights_and_grads", True, "masters and gradient sums are fp32 here: leave it out."),
    ("bf16.check_grad_overflow", False, "one non-finite gradient would make every weight NaN under ZeRO 1 and 2: set it to true."),
)


def refused(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    """One sentence for every DeepSpeed setting that must not stand."""
    problems = [f"{path} is refused: {why}" for path, why in REFUSED.items() if _is_set(read(deepspeed, path))]
    problems += [_said(deepspeed, path) + f" is refused: {why}" for path, bad, why in REFUSED_VALUES if read(deepspeed, path) == bad]
    for check in (_stage, _clipping, _precision, _autocast, _accumulation, _communication, _optimizer_switches, _offload, _partitions):
        problems += check(deepspeed, megastab)
    return problems


def _is_set(value: Any) -> bool:
    """Whether a refused section does anything: absent, null, false, 0, {} and {"enabled": false} do not, nor does "auto"."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) is not False
    return bool(value) and value != "auto"


def _said(deepspeed: dict[str, Any], path: str) -> str:
    return f"{path} = {json.dumps(read(deepspeed, path))}"


def _stage(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    stage = read(deepspeed, "zero_optimization.stage", 0)
    if isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= 3:
        return []
    return [f"zero_optimization.stage = {json.dumps(stage)} must be 0, 1, 2 or 3."]


def _clipping(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    value = read(deepspeed, "gradient_clipping", 0.0)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return []
    return [f"gradient_clipping = {json.dumps(value)} must be a number: the largest global norm, or 0.0 for no clipping."]


def _precision(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    if read(deepspeed, "bf16.enabled") and read(deepspeed, "fp16.enabled"):
        return ["bf16.enabled and fp16.enabled are both true: keep one."]
    return []


def _autocast(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    if not read(deepspeed, "torch_autocast.enabled") or read(deepspeed, "torch_autocast.dtype") not in (
        "fp16",
        "float16",
        "half",
        "torch.float16",
    ):
        return []
    return [
        _said(deepspeed, "torch_autocast.dtype") + " is refused: under ZeRO the clip factor is wrong by the loss scale. "
        'Use "fp16" or "bf16" instead of torch_autocast.'
    ]


def _accumulation(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    dtype, precision = read(deepspeed, "data_types.grad_accum_dtype", "fp32"), precision_of(deepspeed)
    if dtype in ("fp32", precision):
        return []
    return [f'data_types.grad_accum_dtype = {json.dumps(dtype)} in a {precision} run: use "fp32", or leave it out.']


def _communication(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    dtype = read(deepspeed, "communication_data_type", "fp32")
    if dtype in ("fp32", "bf16", "fp16"):
        return []
    return [f"communication_data_type = {json.dumps(dtype)} must be fp32, bf16 or fp16; leave it out for fp32."]


def _optimizer_switches(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    problems = []
    if (stage_or_zero(deepspeed) > 0 or precision_of(deepspeed) != "fp32") and read(deepspeed, "zero_allow_untested_optimizer") is False:
        problems.append("zero_allow_untested_optimizer = false is refused: megastab builds the optimizer itself; set it to true.")
    if offload_device(deepspeed, "optimizer") != "none" and read(deepspeed, "zero_force_ds_cpu_optimizer") is True:
        problems.append("zero_force_ds_cpu_optimizer = true is refused: megastab builds the optimizer itself; set it to false.")
    return problems


def stage_or_zero(deepspeed: dict[str, Any]) -> int:
    """The ZeRO stage, or 0 where what is written is no stage (which is reported elsewhere)."""
    return stage_of(deepspeed) if not _stage(deepspeed, None) else 0  # type: ignore[arg-type]


def _offload(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    problems, stage = [], stage_or_zero(deepspeed)
    for what, lowest in (("optimizer", 1), ("param", 3)):
        device, path = offload_device(deepspeed, what), f"zero_optimization.offload_{what}"
        if device not in ("none", "cpu"):
            problems.append(f'{path}.device = "{device}" is refused: methods that read the fp32 masters cannot reach a disk; use "cpu".')
        elif device == "cpu" and stage < lowest:
            problems.append(f"{path} with zero_optimization.stage = {stage}: it needs stage {lowest}{' or higher' if lowest < 3 else ''}.")
    return problems


def _partitions(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    if not sends_slices(megastab):
        return []
    paths = ("pipeline.pipe_partitioned", "pipeline.grad_partitioned")
    return [
        f"{path} = true under megastab.parallel.sequence would mix the slices of different ranks: set it to false, or leave it out."
        for path in paths
        if read(deepspeed, path)
    ]
