from __future__ import annotations

import json

import pytest

from megastab.config.refusals import REFUSED, REFUSED_VALUES

# A value that would do something, where a section with one known key is not enough.
SOME_SECTION = '{"some": 1}'
VALUES = {
    "bfloat16": '{"enabled": true}',
    "data_parallel_size": "2",
    "sequence_parallel_size": "2",
    "scheduler": '{"type": "WarmupLR"}',
    "pipeline.activation_checkpoint_interval": "1",
    "pipeline.stages": "2",
    "zero_optimization.cpu_offload": "true",
    "zero_optimization.cpu_offload_param": "true",
    "zero_optimization.cpu_offload_use_pin_memory": "true",
}
REPLACEMENTS = {
    "activation_checkpointing": "megastab.parallel.recompute",
    "compile": "megastab.run.compile",
    "scheduler": "megastab.schedule",
    "tensor_parallel": "megastab.parallel.tensor",
    "sequence_parallel_size": "megastab.parallel.sequence",
    "bfloat16": '"bf16"',
    "pipeline.stages": "megastab.parallel.pipeline",
}


@pytest.mark.parametrize("path", REFUSED)
def test_section_is_refused_with_its_reason_and_replacement(refuse, path: str) -> None:
    message = refuse(f"{path}={VALUES.get(path, SOME_SECTION)}")
    assert f"{path} is refused: {REFUSED[path]}" in message
    assert REPLACEMENTS.get(path, "") in message


@pytest.mark.parametrize("section", ["compile", "activation_checkpointing", "tensor_parallel", "data_efficiency"])
@pytest.mark.parametrize("off", ["{}", "null", '{"enabled": false}'])
def test_section_that_does_nothing_is_let_pass(load, section: str, off: str) -> None:
    load(f"{section}={off}")


@pytest.mark.parametrize(("path", "bad", "why"), REFUSED_VALUES, ids=[path for path, _, _ in REFUSED_VALUES])
def test_switch_is_refused_at_one_value_only(load, refuse, path: str, bad: bool, why: str) -> None:
    assert f"{path} = {json.dumps(bad)} is refused: {why}" in refuse(f"{path}={json.dumps(bad)}")
    load(f"{path}={json.dumps(not bad)}")
    assert f'{path} = "{str(bad).lower()}" must be true or false.' in refuse(f'{path}="{str(bad).lower()}"')


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["bf16.enabled=true", "fp16.enabled=true"], "bf16.enabled and fp16.enabled are both true: set one of them to false."),
        (["bf16.enabled=1"], "bf16.enabled = 1 must be true or false."),
        (["zero_optimization.stage=4"], "zero_optimization.stage = 4 must be 0, 1, 2 or 3."),
        (["zero_optimization.stage=true"], "zero_optimization.stage = true must be 0, 1, 2 or 3."),
        (["gradient_clipping=-1"], "gradient_clipping = -1 must be a number"),
        (["gradient_clipping=off"], 'gradient_clipping = "off" must be a number'),
        (["gradient_allreduce_op=sum"], 'gradient_allreduce_op = "sum" is refused'),
        (["data_types.grad_accum_dtype=bf16"], 'data_types.grad_accum_dtype = "bf16" in a fp32 run: use "fp32"'),
        (["fp16.enabled=true", "data_types.grad_accum_dtype=bf16"], 'data_types.grad_accum_dtype = "bf16" in a fp16 run'),
        (["communication_data_type=float32"], 'communication_data_type = "float32" must be fp32, bf16 or fp16'),
        (["zero_optimization.stage=1", "zero_allow_untested_optimizer=false"], "zero_allow_untested_optimizer = false is refused"),
        (["bf16.enabled=true", "zero_allow_untested_optimizer=false"], "set it to true"),
        (
            ["zero_optimization.stage=1", "zero_optimization.offload_optimizer.device=cpu", "zero_force_ds_cpu_optimizer=true"],
            "zero_force_ds_cpu_optimizer = true is refused",
        ),
        (["zero_optimization.stage=3", "zero_optimization.offload_param.device=nvme"], 'offload_param.device = "nvme" is refused'),
        (["zero_optimization.stage=1", "zero_optimization.offload_optimizer.device=nvme"], 'use "cpu"'),
        (["zero_optimization.stage=2", "zero_optimization.offload_param.device=cpu"], "stage = 2: set the stage to 3, or device"),
        (["bf16.enabled=true", "zero_optimization.offload_param.device=cpu"], "zero_optimization.stage = 1: set the stage to 3"),
        (["zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=gpu"], 'device = "gpu" must be "cpu" or "none"'),
        (["zero_optimization.stage=2", "zero_optimization.offload_optimizer.pin_memory=7"], "pin_memory = 7 must be true or false"),
        (["zero_optimization.stage=2", "zero_optimization.offload_optimizer.ratio=2"], "ratio = 2 must be a share, from 0 to 1"),
        (["zero_optimization.reduce_bucket_size=0"], "reduce_bucket_size = 0 must be a number of elements, 1 or more"),
        (["zero_optimization.stage=2", "zero_optimization.reduce_bucket_size=5e6.5"], 'reduce_bucket_size = "5e6.5" must be'),
        (["zero_optimization.stage=3", "zero_optimization.stage3_max_live_parameters=x"], 'max_live_parameters = "x" must be'),
        (["zero_optimization.stage=3", "zero_optimization.stage3_prefetch_bucket_size=-1"], "elements, 0 or more"),
        (["zero_optimization.offload_optimizer.device=cpu"], "stage = 0: set the stage to 1, or device"),
        (
            ["zero_optimization.stage=1", "torch_autocast.enabled=true", "torch_autocast.dtype=float16"],
            'torch_autocast.dtype = "float16" with ZeRO is refused',
        ),
    ],
)
def test_bad_value_is_refused_with_the_fix(refuse, overrides: list[str], said: str) -> None:
    message = refuse(*overrides)
    assert said in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("key", ["pipe_partitioned", "grad_partitioned"])
def test_partitioned_payloads_are_refused_under_sequence_parallelism_only(load, refuse, key: str) -> None:
    layout = ["megastab.parallel.tensor=2", "megastab.parallel.pipeline=2", f"pipeline.{key}=true"]
    load(*layout, world=4)
    message = refuse(*layout, "megastab.parallel.sequence=true", world=4)
    assert f"pipeline.{key} = true under megastab.parallel.sequence" in message
    assert "set it to false" in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer=null"], "optimizer.type is missing: one of AdamW, Adam, SGD, OrthoAdam."),
        (["optimizer.type=Lion"], "optimizer.type = 'Lion' is not one of AdamW, Adam, SGD, OrthoAdam."),
        (["optimizer.type=AdmW"], "Did you mean adamw?"),
        (["optimizer.params.lr=null"], "optimizer.params.lr is missing"),
        (["optimizer.params=3"], "optimizer.params = 3 must be a section"),
        (["optimizer.params.lr=-1"], "optimizer.params.lr = -1 must be a number from 0."),
        (["optimizer.params.lr=1e-3x"], "optimizer.params.lr = '1e-3x' must be a number from 0."),
        (["optimizer.params.max_grad_norm=1"], "optimizer.params.max_grad_norm is refused by DeepSpeed: use gradient_clipping"),
        (
            ["optimizer.params.weight_decy=1"],
            "not a parameter of AdamW (lr, betas, eps, weight_decay). Did you mean optimizer.params.weight_decay?",
        ),
        (["optimizer.params.momentum=0.9"], "optimizer.params.momentum is not a parameter of AdamW"),
        (["optimizer.type=OrthoAdam", "optimizer.params.rotation=dense"], "rotation = 'dense' must be one of hadamard, haar, none."),
        (["optimizer.type=OrthoAdam", "optimizer.params.seed=-1"], "seed = -1 must be a whole number from 0."),
        (["optimizer.type=OrthoAdam", "optimizer.params.max_axis=1"], "max_axis = 1 must be a whole number from 2."),
        (["optimizer.type=OrthoAdam", "optimizer.params.rotate_vectors=1"], "rotate_vectors = 1 must be true or false."),
        (["optimizer.type=OrthoAdam", "optimizer.params.fused=true"], "optimizer.params.fused is not a parameter of OrthoAdam"),
        (["optimizer.params.betas=[0.9]"], "optimizer.params.betas = [0.9] must be two numbers"),
        (["optimizer.params.betas=[0.9, 1.0]"], "two numbers in [0, 1)"),
    ],
)
def test_wrong_optimizer_is_told(refuse, overrides: list[str], said: str) -> None:
    assert said in refuse(*overrides)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ('{"lr": 1, "nesterov": true}', "optimizer.params.nesterov = True needs optimizer.params.momentum above 0."),
        ('{"lr": 1, "momentum": 1.5}', "optimizer.params.momentum = 1.5 must be a number in [0, 1)."),
        ('{"lr": 1, "momentum": 1}', "optimizer.params.momentum = 1 must be a number in [0, 1)."),
        ('{"lr": 1, "nesterov": 1}', "optimizer.params.nesterov = 1 must be true or false."),
    ],
)
def test_wrong_sgd_parameters_are_told(refuse, params: str, said: str) -> None:
    assert said in refuse("optimizer.type=sgd", f"optimizer.params={params}")


def test_plain_sgd_and_zero_decay_are_legal(load) -> None:
    config = load("optimizer.type=SGD", 'optimizer.params={"lr": 0, "momentum": 0, "weight_decay": 0, "nesterov": false}')
    assert config.optimizer_params == {"lr": 0, "momentum": 0, "weight_decay": 0, "nesterov": False}


@pytest.mark.parametrize(
    "overrides",
    [
        ("torch_autocast.enabled=true", "torch_autocast.dtype=fp16"),
        ("zero_optimization.stage=1", "torch_autocast.enabled=false", "torch_autocast.dtype=fp16"),
        ("zero_optimization.stage=1", "torch_autocast.enabled=true", "torch_autocast.dtype=bf16"),
    ],
    ids=["no zero", "off", "bf16"],
)
def test_autocast_is_refused_for_fp16_with_zero_only(load, overrides: tuple[str, ...]) -> None:
    load(*overrides)


def test_optimizer_parameters_are_in_the_signature_of_the_class() -> None:
    import inspect

    import torch

    from megastab import OrthoAdam
    from megastab.config.optimizers import OPTIMIZER_PARAMS

    for name, params in OPTIMIZER_PARAMS.items():
        built = OrthoAdam if name == "OrthoAdam" else getattr(torch.optim, name)
        assert set(params) <= set(inspect.signature(built).parameters), name
