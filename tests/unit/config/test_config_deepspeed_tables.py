"""The static tables against the installed DeepSpeed: what it is seen to read, and the fields of its pydantic models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megastab.config.deepspeed_keys import REMOVED, REMOVED_ZERO, SECTIONS, TOP_LEVEL

# Read before or outside DeepSpeedConfig: deepspeed/__init__.py:543, and only when both are there.
READ_ELSEWHERE = {"data_parallel_size", "sequence_parallel_size"}


class Recorder(dict[str, Any]):
    """A dict that remembers every key anybody asks for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def __copy__(self) -> Recorder:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # DeepSpeed writes `in param_dict.keys()`
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


@pytest.fixture(scope="module")
def read_config() -> Recorder:
    from deepspeed.runtime.config import DeepSpeedConfig

    nested = ("optimizer", "checkpoint", "data_types", "timers", "aio", "flops_profiler", "torch_autocast")
    config = Recorder({name: Recorder() for name in nested}, train_batch_size=1)
    config["optimizer"].update(type="AdamW", params={})
    config["checkpoint"].update(parallel_write=Recorder(), writer=Recorder())
    config["torch_autocast"].update(dtype="bf16", lower_precision_safe_modules=[])
    DeepSpeedConfig(config)
    return config


def test_version_is_the_one_the_tables_were_read_from() -> None:
    import deepspeed

    assert deepspeed.__version__.startswith("0.19.8")


def test_top_level_names_are_those_deepspeed_asks_for(read_config: Recorder) -> None:
    known = set(TOP_LEVEL) | set(REMOVED)
    assert read_config.asked - known == set()
    assert known - read_config.asked == READ_ELSEWHERE - read_config.asked


@pytest.mark.parametrize(
    "path",
    [
        "optimizer",
        "checkpoint",
        "checkpoint.parallel_write",
        "checkpoint.writer",
        "data_types",
        "timers",
        "aio",
        "flops_profiler",
        "torch_autocast",
    ],
)
def test_names_of_unvalidated_sections_are_those_deepspeed_asks_for(read_config: Recorder, path: str) -> None:
    section: Any = read_config
    for key in path.split("."):
        section = dict.get(section, key)
    assert section.asked == set(SECTIONS[path])


def test_pipeline_names_are_its_defaults_and_use_reentrant() -> None:
    from deepspeed.runtime.config import get_pipeline_config

    # use_reentrant has no default there: the pipeline engine reads it (pipe/engine.py:210).
    assert set(SECTIONS["pipeline"]) == set(get_pipeline_config({})) | {"use_reentrant"}


def _pydantic_sections() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    }


def test_names_of_pydantic_sections_are_their_fields_and_aliases() -> None:
    for path, model in _pydantic_sections().items():
        fields = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert set(SECTIONS[path]) == fields, path


def test_every_section_is_compared_with_deepspeed() -> None:
    unvalidated = {"optimizer", "pipeline", "checkpoint", "checkpoint.parallel_write", "checkpoint.writer", "data_types"}
    unvalidated |= {"timers", "aio", "flops_profiler", "torch_autocast"}
    assert set(SECTIONS) == unvalidated | set(_pydantic_sections())


def test_removed_names_are_those_deepspeed_raises_on() -> None:
    from deepspeed.runtime import config as source

    assert set(REMOVED) == set(source._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(REMOVED_ZERO) == set(source._REMOVED_ZERO_CONFIG_KEYS)


def test_tables_are_sorted_and_free_of_repeats() -> None:
    for names in (TOP_LEVEL, REMOVED, REMOVED_ZERO, *SECTIONS.values()):
        assert list(names) == sorted(set(names))
