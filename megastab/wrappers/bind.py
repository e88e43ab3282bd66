"""From an engine to its adapter, and DeepSpeed's start made quiet."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger
from torch.optim import Optimizer

from megastab.parallel.grid import Grid
from megastab.wrappers.adapter import Adapter, UnsupportedEngine, check_version
from megastab.wrappers.bf16 import BF16Adapter
from megastab.wrappers.plain import PlainAdapter
from megastab.wrappers.zero3 import Zero3Adapter
from megastab.wrappers.zero12 import Zero12Adapter


def bind(engine: Any, grid: Grid) -> Adapter:
    """The adapter of ``engine``'s optimizer wrapper.

    Raises:
        UnsupportedEngine: a wrapper, or a DeepSpeed version, we do not drive.
    """
    check_version()
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return BF16Adapter(engine)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Zero3Adapter(engine)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return Zero12Adapter(engine)
    if isinstance(optimizer, Optimizer):
        return PlainAdapter(engine, grid)
    raise UnsupportedEngine(f"megastab does not drive DeepSpeed's {type(optimizer).__name__}; use ZeRO stage 1 for bf16 and fp16")


def skip_shm_build() -> None:
    """Keep DeepSpeed from compiling its CPU shared-memory op (a minute on first use): training never calls it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what DeepSpeed prints and logs below warnings; errors still rise."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
