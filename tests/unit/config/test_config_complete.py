from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megastab.config.complete import TRAPS, is_cpu_run
from megastab.config.settings import read

BF16, FP16 = "bf16.enabled=true", "fp16.enabled=true"
OFFLOAD = "zero_optimization.offload_optimizer.device=cpu"
SLICES = ("megastab.parallel.tensor=2", "megastab.parallel.pipeline=2", "megastab.parallel.sequence=true")
TB, CSV = "tensorboard.enabled=true", "csv_monitor.enabled=true"

# key -> (overrides under which it is completed, its value, overrides under which it is left alone)
CASES: dict[str, tuple[tuple[str, ...], Any, tuple[str, ...] | None]] = {
    "gradient_clipping": ((), 1.0, ("gradient_clipping=0.0",)),
    "zero_allow_untested_optimizer": (("zero_optimization.stage=2",), True, ()),
    "zero_force_ds_cpu_optimizer": (("zero_optimization.stage=1", OFFLOAD), False, ("zero_optimization.stage=1",)),
    "data_types.grad_accum_dtype": ((FP16,), "fp32", ()),
    "communication_data_type": ((BF16,), "fp32", (BF16, "communication_data_type=bf16")),
    "bf16.check_grad_overflow": ((BF16,), True, (FP16,)),
    "zero_optimization.reduce_bucket_size": (("zero_optimization.stage=3",), 5_000_000, ()),
    "timers.throughput.enabled": ((), False, ("timers.throughput.enabled=true",)),
    "steps_per_print": ((), 1000, ("steps_per_print=7",)),
    "pipeline.pipe_partitioned": (SLICES, False, SLICES[:2]),
    "pipeline.grad_partitioned": (SLICES, False, SLICES[:2]),
    "tensorboard.job_name": ((TB,), "tensorboard", (TB, "tensorboard.output_path=x")),
    "tensorboard.output_path": ((TB,), "runs/small", ("tensorboard.enabled=false",)),
    "csv_monitor.job_name": ((CSV,), "csv", (CSV, "csv_monitor.output_path=x")),
    "csv_monitor.output_path": ((CSV,), "runs/small", ()),
}


def test_every_trap_has_a_case_and_a_reason() -> None:
    assert list(CASES) == [trap.key for trap in TRAPS]
    assert all(len(trap.reason) > 30 for trap in TRAPS)


@pytest.mark.parametrize("key", CASES)
def test_trap_is_completed_with_its_reason(load, key: str) -> None:
    overrides, value, _ = CASES[key]
    config = load(*overrides, world=4)
    written = {completion.key: completion for completion in config.completions}
    assert written[key].value == value
    assert read(config.deepspeed, key) == value
    assert written[key].reason == next(trap.reason for trap in TRAPS if trap.key == key)


@pytest.mark.parametrize("key", CASES)
def test_key_is_left_alone_where_it_is_written_or_has_no_meaning(load, key: str) -> None:
    config = load(*CASES[key][2], world=4)
    assert key not in [completion.key for completion in config.completions]


@pytest.mark.parametrize("precision", [BF16, FP16])
@pytest.mark.parametrize("stage", [(), ("zero_optimization.stage=0",)], ids=["missing", "zero"])
def test_16_bit_without_zero_is_promoted_and_says_so(load, precision: str, stage: tuple[str, ...]) -> None:
    config = load(precision, *stage)
    assert config.zero_stage == 1
    assert [(c.key, c.value) for c in config.completions][0] == ("zero_optimization.stage", 1)
    assert "wrong under tensor parallelism" in config.completions[0].reason


@pytest.mark.parametrize("overrides", [(), (BF16, "zero_optimization.stage=2")], ids=["fp32", "bf16-zero2"])
def test_other_stages_are_left_alone(load, overrides: tuple[str, ...]) -> None:
    config = load(*overrides)
    assert "zero_optimization.stage" not in [completion.key for completion in config.completions]
    assert config.zero_stage == (2 if overrides else 0)


def test_bucket_is_larger_on_an_accelerator_and_never_overridden(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert load(BF16).deepspeed["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert load(BF16, "zero_optimization.reduce_bucket_size=12").deepspeed["zero_optimization"]["reduce_bucket_size"] == 12


def test_users_job_name_gets_a_folder_of_its_own(load) -> None:
    section = load(TB, "tensorboard.job_name=mine").deepspeed["tensorboard"]
    assert section == {"enabled": True, "job_name": "mine", "output_path": "runs/small/tensorboard"}


def test_null_means_absent(load) -> None:
    deepspeed = load("steps_per_print=null", "bf16=null", "zero_optimization=null", "gradient_accumulation_steps=null").deepspeed
    assert deepspeed["steps_per_print"] == 1000
    assert "bf16" not in deepspeed and "zero_optimization" not in deepspeed
    assert deepspeed["gradient_accumulation_steps"] == 8


def test_deepspeed_accepts_what_is_completed(load) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load(BF16, OFFLOAD, TB, CSV, *SLICES[:1], "megastab.parallel.sequence=true", "train_batch_size=2", world=2)
    read_back = DeepSpeedConfig(config.deepspeed)
    assert read_back.zero_optimization_stage == 1
    assert read_back.grad_accum_dtype == "fp32"
    assert read_back.gradient_clipping == 1.0
    assert read_back.monitor_config.tensorboard.output_path == "runs/small"


@pytest.mark.parametrize(("device", "is_cpu"), [(None, True), ("/dev/nvidiactl", False), ("/dev/kfd", False)])
def test_accelerator_is_guessed_from_its_device_file(monkeypatch: pytest.MonkeyPatch, device: str | None, is_cpu: bool) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == device)
    assert is_cpu_run() == is_cpu
