"""The names DeepSpeed 0.19.8 reads, and the check that a config uses no other.

DeepSpeed takes an unknown top-level name in silence, and an unknown name inside ``optimizer``, ``pipeline``, ``checkpoint`` and
``data_types`` too; inside its pydantic sections it complains, but only after half a minute of imports on every rank. The tables
are static, so that the check costs no import; a test compares them with the installed source.
"""

from __future__ import annotations

import json
from typing import Any

from megastab.config.nearest import did_you_mean
from megastab.config.schema_errors import homes

TOP_LEVEL = (
    "activation_checkpointing",
    "aio",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_parallel_size",
    "data_types",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "hybrid_engine",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

# Names DeepSpeed once read and now raises on.
REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
REMOVED_ZERO = ("mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param")

# fmt: off
# Sections whose keys are all known here; a section not listed is either refused (rules) or a plain value.
SECTIONS: dict[str, tuple[str, ...]] = {
    "optimizer": ("legacy_fusion", "params", "type"),
    "pipeline": (
        "activation_checkpoint_interval", "grad_partitioned", "partition", "pipe_partitioned", "seed_layers", "stages", "use_reentrant",
    ),
    "checkpoint": ("checkpoint_serialization", "load_universal", "parallel_write", "tag_validation", "use_node_local_storage", "writer"),
    "checkpoint.parallel_write": ("pipeline_stage",),
    "checkpoint.writer": ("data_parallel", "decoupled", "io_buffer_double", "io_buffer_size", "io_multiplier", "show_statistics", "type"),
    "data_types": ("buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"),
    "torch_autocast": ("dtype", "enabled", "lower_precision_safe_modules"),
    "flops_profiler": ("detailed", "enabled", "module_depth", "output_file", "profile_step", "recompute_fwd_factor", "top_modules"),
    "aio": ("block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds"),
    "timers": ("throughput",),
    "timers.throughput": ("enabled", "synchronized"),
    "comms_logger": ("debug", "enabled", "prof_all", "prof_ops", "verbose"),
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "enabled", "immediate_grad_update"),
    "fp16": (
        "auto_cast", "consecutive_hysteresis", "enabled", "fp16_master_weights_and_grads", "hysteresis", "initial_scale_power",
        "loss_scale", "loss_scale_window", "min_loss_scale",
    ),
    "tensorboard": ("enabled", "job_name", "output_path"),
    "csv_monitor": ("enabled", "job_name", "output_path"),
    "wandb": ("enabled", "group", "project", "team"),
    "comet": ("api_key", "enabled", "experiment_key", "experiment_name", "mode", "online", "project", "samples_log_interval", "workspace"),
    "zero_optimization": (
        "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm", "contiguous_gradients",
        "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
        "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
        "log_trace_cache_warnings", "max_live_parameters", "max_reuse_distance", "memory_efficient_linear",
        "model_persistence_threshold", "module_granularity_threshold", "offload_optimizer", "offload_param", "overlap_comm",
        "override_module_apply", "param_persistence_threshold", "parameter_alignment", "pipeline_loading_checkpoint",
        "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory",
        "stage", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce",
        "zenflow", "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
    ),
    "zero_optimization.offload_param": ("buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"),
    "zero_optimization.offload_optimizer": (
        "buffer_count", "cpuadam_cores_perc", "device", "fast_init", "nvme_path", "pin_memory", "pipeline_read", "pipeline_write",
        "ratio", "super_offload",
    ),
    "zero_optimization.leaf_module": ("classes", "name_suffixes", "names"),
}
# fmt: on

# The only keys for which DeepSpeed itself understands "auto".
_AUTO_ALLOWED = ("pipeline.stages", "data_types.keep_in_fp32_modules")


def wrong_names(deepspeed: dict[str, Any], prefix: str = "") -> list[str]:
    """One sentence for every key DeepSpeed would ignore or refuse; sections that are not objects included."""
    known = SECTIONS[prefix] if prefix else TOP_LEVEL
    problems = []
    for key, value in deepspeed.items():
        path = f"{prefix}.{key}" if prefix else key
        if key not in known:
            problems.append(_unknown(path, key, known))
        elif value == "auto" and path not in _AUTO_ALLOWED:
            problems.append(f'{path} = "auto" is resolved by nobody here: write the value.')
        elif path in SECTIONS and value is not None:
            if isinstance(value, dict):
                problems += wrong_names(value, path)
            else:
                problems.append(f"{path} = {json.dumps(value)} must be a section: {{...}}.")
    return problems


def _unknown(path: str, key: str, known: tuple[str, ...]) -> str:
    if path in REMOVED or (path.startswith("zero_optimization.") and key in REMOVED_ZERO):
        return f"{path} was removed from DeepSpeed: delete it."
    return f"{path} is not a key DeepSpeed 0.19.8 reads.{did_you_mean(key, known, homes(), path.removesuffix(key))}"
