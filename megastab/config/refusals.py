"""DeepSpeed settings that are legal there and wrong here: each with the reason and what to write instead."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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

# Switches that must not stand at this value -> why, and what to write.
REFUSED_VALUES: tuple[tuple[str, bool, str], ...] = (
    ("managed_gradient_accumulation", False, "the trainer counts micro-batches as DeepSpeed does: leave it out."),
    ("zero_optimization.round_robin_gradients", True, "it makes DeepSpeed's map from parameters to fp32 masters wrong: leave it out."),
    ("zero_optimization.compute_grad_norm", False, "clipping and every stability method need the norm: leave it out."),
    ("zero_optimization.offload_optimizer.super_offload", True, "it replaces the optimizer wrapper: leave it out."),
    ("bf16.bf16_master_weights_and_grads", True, "masters and gradient sums are fp32 here: leave it out."),
    ("bf16.bf16_optimizer_states", True, "optimizer states are fp32 here: leave it out."),
    ("fp16.fp16_master_weights_and_grads", True, "masters and gradient sums are fp32 here: leave it out."),
    ("bf16.check_grad_overflow", False, "one non-finite gradient would make every weight NaN under ZeRO 1 and 2: set it to true."),
)

_SWITCHES = (
    *(path for path, _, _ in REFUSED_VALUES),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization.overlap_comm"),
    *(f"zero_optimization.offload_{what}.pin_memory" for what in ("optimizer", "param")),
)


_ELEMENTS = (
    *("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "sub_group_size", "param_persistence_threshold"),
    *("model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
)


def refused(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    """One sentence for every DeepSpeed setting that must not stand."""
    problems = [f"{path} is refused: {why}" for path, why in REFUSED.items() if _is_set(read(deepspeed, path))]
    problems += [f"{_said(deepspeed, path)} is refused: {why}" for path, bad, why in REFUSED_VALUES if read(deepspeed, path) is bad]
    if read(deepspeed, "gradient_allreduce_op", "mean") != "mean":
        problems.append(f"{_said(deepspeed, 'gradient_allreduce_op')} is refused: the loss is a mean over the whole step; leave it out.")
    for check in _CHECKS:
        problems += check(deepspeed)
    return problems + _partitions(deepspeed, megastab)


def _is_set(value: Any) -> bool:
    """Whether a refused section does anything: absent, null, false, 0, {} and {"enabled": false} do not, nor does "auto"."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) is not False
    return bool(value) and value != "auto"


def _said(deepspeed: dict[str, Any], path: str) -> str:
    return f"{path} = {json.dumps(read(deepspeed, path))}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stage(deepspeed: dict[str, Any]) -> list[str]:
    stage = read(deepspeed, "zero_optimization.stage", 0)
    if isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage <= 3:
        return []
    return [f"zero_optimization.stage = {json.dumps(stage)} must be 0, 1, 2 or 3."]


def _legal_stage(deepspeed: dict[str, Any]) -> int:
    """The stage, or 0 where what is written is none (``_stage`` reports that)."""
    return 0 if _stage(deepspeed) else stage_of(deepspeed)


def _clipping(deepspeed: dict[str, Any]) -> list[str]:
    value = read(deepspeed, "gradient_clipping", 0.0)
    if _number(value) and value >= 0:
        return []
    return [f"gradient_clipping = {json.dumps(value)} must be a number: the largest global norm, or 0.0 for no clipping."]


def _switches(deepspeed: dict[str, Any], prefix: str = "") -> list[str]:
    """A switch must be a JSON boolean: the word "false" would be true for one reader and false for another."""
    problems = []
    for key, value in deepspeed.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            problems += _switches(value, f"{path}.")
        elif (key == "enabled" or path in _SWITCHES) and value is not None and not isinstance(value, bool):
            problems.append(f"{path} = {json.dumps(value)} must be true or false.")
    return problems


def _precision(deepspeed: dict[str, Any]) -> list[str]:
    if read(deepspeed, "bf16.enabled") and read(deepspeed, "fp16.enabled"):
        return ["bf16.enabled and fp16.enabled are both true: set one of them to false."]
    return []


def _autocast(deepspeed: dict[str, Any]) -> list[str]:
    half = read(deepspeed, "torch_autocast.dtype") in ("fp16", "float16", "half", "torch.float16")
    if not half or not read(deepspeed, "torch_autocast.enabled") or _legal_stage(deepspeed) == 0:
        return []
    said = _said(deepspeed, "torch_autocast.dtype")
    return [f"{said} with ZeRO is refused: the clip factor would be wrong by the loss scale. Use the fp16 or bf16 section instead."]


def _accumulation(deepspeed: dict[str, Any]) -> list[str]:
    dtype, precision = read(deepspeed, "data_types.grad_accum_dtype", "fp32"), precision_of(deepspeed)
    if dtype in ("fp32", precision):
        return []
    return [f'data_types.grad_accum_dtype = {json.dumps(dtype)} in a {precision} run: use "fp32", or leave it out.']


def _communication(deepspeed: dict[str, Any]) -> list[str]:
    dtype = read(deepspeed, "communication_data_type", "fp32")
    if dtype in ("fp32", "bf16", "fp16"):
        return []
    return [f"communication_data_type = {json.dumps(dtype)} must be fp32, bf16 or fp16; leave it out for fp32."]


def _own_optimizer(deepspeed: dict[str, Any]) -> list[str]:
    problems = []
    has_zero = _legal_stage(deepspeed) > 0 or precision_of(deepspeed) != "fp32"  # 16-bit runs are promoted to stage 1
    if has_zero and read(deepspeed, "zero_allow_untested_optimizer") is False:
        problems.append("zero_allow_untested_optimizer = false is refused: megastab builds the optimizer itself; set it to true.")
    if offload_device(deepspeed, "optimizer") != "none" and read(deepspeed, "zero_force_ds_cpu_optimizer") is True:
        problems.append("zero_force_ds_cpu_optimizer = true is refused: megastab builds the optimizer itself; set it to false.")
    return problems


def _offload(deepspeed: dict[str, Any]) -> list[str]:
    problems, stage = [], _legal_stage(deepspeed)
    if precision_of(deepspeed) != "fp32":
        stage = max(1, stage)  # promoted
    for what, lowest in (("optimizer", 1), ("param", 3)):
        device, path = offload_device(deepspeed, what), f"zero_optimization.offload_{what}"
        if device not in ("none", "cpu", "nvme"):
            problems.append(f'{path}.device = {json.dumps(device)} must be "cpu" or "none".')
        elif device == "nvme":
            problems.append(f'{path}.device = "{device}" is refused: what reads the fp32 masters cannot reach a disk; use "cpu".')
        elif device == "cpu" and stage < lowest:
            problems.append(
                f'{path}.device = "cpu" with zero_optimization.stage = {stage}: set the stage to {lowest}, or device to "none".'
            )
    return problems


def _amounts(deepspeed: dict[str, Any]) -> list[str]:
    """What DeepSpeed would meet with a traceback on every rank, and the planner calculates with."""
    problems, zero = [], read(deepspeed, "zero_optimization", {})
    for key in (prefix + name for name in _ELEMENTS for prefix in ("", "stage3_")) if isinstance(zero, dict) else ():
        value, least = zero.get(key), 1 if key.endswith("reduce_bucket_size") else 0
        if value is not None and value != "auto" and not (_number(value) and least <= value < math.inf and value == int(value)):
            problems.append(f"zero_optimization.{key} = {json.dumps(value)} must be a number of elements, {least} or more.")
    for what in ("optimizer", "param"):
        ratio, path = read(deepspeed, f"zero_optimization.offload_{what}.ratio"), f"zero_optimization.offload_{what}.ratio"
        if ratio is not None and not (_number(ratio) and 0 <= ratio <= 1):
            problems.append(f"{path} = {json.dumps(ratio)} must be a share, from 0 to 1.")
    return problems


_CHECKS: tuple[Callable[[dict[str, Any]], list[str]], ...] = (
    _stage,
    _clipping,
    _switches,
    _precision,
    _autocast,
    _accumulation,
    _communication,
    _own_optimizer,
    _offload,
    _amounts,
)


def _partitions(deepspeed: dict[str, Any], megastab: Megastab) -> list[str]:
    if not sends_slices(megastab):
        return []
    paths = ("pipeline.pipe_partitioned", "pipeline.grad_partitioned")
    return [
        f"{path} = true under megastab.parallel.sequence would mix the slices of different ranks: set it to false, or leave it out."
        for path in paths
        if read(deepspeed, path)
    ]
