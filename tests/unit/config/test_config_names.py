from __future__ import annotations

import pytest

from megastab.config.errors import UserError
from megastab.config.load import load_config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gradient_cliping=1.0", "gradient_cliping is not a key DeepSpeed 0.19.8 reads. Did you mean gradient_clipping?"),
        ("train_micro_batch_size_per_GPU=1", "Did you mean train_micro_batch_size_per_gpu?"),
        ("total_steps=3", "Did you mean megastab.run.total_steps?"),
        ("optimizer.param.lr=1", "optimizer.param is not a key DeepSpeed 0.19.8 reads. Did you mean optimizer.params?"),
        ("pipeline.pipe_partition=false", "Did you mean pipeline.pipe_partitioned?"),
        ("data_types.grad_accum_type=fp32", "Did you mean data_types.grad_accum_dtype?"),
        ("checkpoint.writer.io_buffer=1", "Did you mean checkpoint.writer.io_buffer_size?"),
        ("zero_optimization.reduce_bucket=1", "Did you mean zero_optimization.reduce_bucket_size?"),
        ("zero_optimization.offload_optimizer.devise=cpu", "Did you mean zero_optimization.offload_optimizer.device?"),
        ("bf16.enable=true", "Did you mean bf16.enabled?"),
        ("tensorboard.path=x", "tensorboard.path is not a key DeepSpeed 0.19.8 reads."),
        ("timers.throughput.enable=false", "Did you mean timers.throughput.enabled?"),
        ("amp.enabled=true", "amp was removed from DeepSpeed: delete it."),
        ("zero_optimization.mics_shard_size=2", "zero_optimization.mics_shard_size was removed from DeepSpeed: delete it."),
        ("bf16=true", "bf16 = true must be a section: {...}."),
        ("gradient_clipping=auto", 'gradient_clipping = "auto" is resolved by nobody here: write the value.'),
        ("zero_optimization.reduce_bucket_size=auto", 'zero_optimization.reduce_bucket_size = "auto"'),
    ],
)
def test_name_deepspeed_does_not_read_is_an_error(refuse, override: str, said: str) -> None:
    assert said in refuse(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("megastab.model.num_layer=4", "megastab.model.num_layer is not a known key. Did you mean megastab.model.num_layers?"),
        ("megastab.modle.arch=gpt", "megastab.modle is not a known key. Did you mean megastab.model?"),
        ("megastab.model.init.schema=lir", "megastab.model.init.schema is not a known key. Did you mean megastab.model.init.scheme?"),
        ("megastab.model.warmup_steps=4", "Did you mean megastab.schedule.warmup_steps?"),
        ("megastab.model.arch=gtp", "megastab.model.arch = \"gtp\" must be 'gpt' or 'llama'."),
        ("megastab.parallel.tensor=0", "megastab.parallel.tensor = 0 is wrong: input should be greater than 0."),
        ('megastab.data.train=[[0, "data/x"]]', "megastab.data.train.0.0 = 0 is wrong"),
        ("megastab.model.hidden_size=null", "megastab.model.hidden_size = null is wrong: input should be a valid integer."),
        ("megastab.run=3", "megastab.run = 3 is wrong"),
        ("megastab=null", 'the "megastab" section is missing.'),
    ],
)
def test_wrong_key_of_ours_is_told_with_path_value_and_remedy(refuse, override: str, said: str) -> None:
    assert said in refuse(override)


def test_missing_key_is_told_with_its_meaning(base) -> None:
    del base["megastab"]["model"]["num_layers"]
    with pytest.raises(UserError, match=r"megastab\.model\.num_layers is missing: Transformer blocks\."):
        load_config(base)


def test_long_values_are_cut(refuse) -> None:
    line = refuse("megastab.parallel.tensor=" + "9" * 30 + "x" * 300).splitlines()[1]
    assert line.startswith('megastab.parallel.tensor = "999', 2) and "xxx... is wrong" in line and len(line) < 250


def test_everything_wrong_is_told_at_once(refuse) -> None:
    message = refuse("gradient_cliping=1", "bf16.enable=true", "megastab.model.num_layer=3", "megastab.run.log_interval=0")
    assert len(message.splitlines()) == 1 + 4
    for key in ("gradient_cliping", "bf16.enable", "megastab.model.num_layer", "megastab.run.log_interval"):
        assert key in message


def test_auto_is_left_to_the_keys_deepspeed_resolves(load) -> None:
    assert load("data_types.keep_in_fp32_modules=auto").deepspeed["data_types"]["keep_in_fp32_modules"] == "auto"


def test_released_name_of_the_cap_is_sent_to_its_home(refuse) -> None:
    message = refuse("megastab.stability.zclip.max_grad_norm=1.0")
    assert "megastab.stability.zclip.max_grad_norm" in message and "gradient_clipping" in message
