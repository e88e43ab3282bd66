"""The grid of an engine somebody else laid out: its own groups, none made but where tensor and data parallelism meet."""

from __future__ import annotations

from typing import Any

import deepspeed

from megastab.parallel import collectives
from megastab.parallel.collectives import Group
from megastab.parallel.grid import ALONE, Axis, Grid, TensorParallel

TENSOR_GROUPS = ("get_tensor_model_parallel_group", "get_model_parallel_group")


def grid_of(engine: Any) -> Grid:
    """This rank's place in a DeepSpeed engine's layout (collective over the job)."""
    # Under Ulysses the masters are cut over sequence x data ranks.
    dp = _axis(getattr(engine, "seq_data_parallel_group", None) or engine.data_parallel_group)
    if isinstance(engine, deepspeed.PipelineEngine):
        parts = engine.grid
        tp, pp = _tensor(parts.get_slice_parallel_group()), _axis(parts.get_pipe_parallel_group())
        model = _axis(parts.get_model_parallel_group())  # DeepSpeed's pipeline grid means tp x pp by it
    else:
        tp, pp = _tensor(_tensor_group(getattr(engine, "mpu", None))), Axis()
        model = Axis(tp.rank, tp.size, tp.group)
    return Grid(tp=tp, dp=dp, pp=pp, model=model, stage=_stage(tp, dp, pp))


def _axis(group: Group) -> Axis:
    size = collectives.group_size(group)
    return Axis(collectives.rank_in(group), size, group) if size > 1 else Axis()


def _tensor(group: Group) -> TensorParallel:
    axis = _axis(group)
    return TensorParallel(axis.rank, axis.size, axis.group) if axis.size > 1 else ALONE


def _tensor_group(mpu: Any) -> Group:
    found = [getattr(mpu, name) for name in TENSOR_GROUPS if hasattr(mpu, name)]
    return found[0]() if found else None


def _stage(tp: Axis, dp: Axis, pp: Axis) -> Axis:
    """All ranks that hold parts or copies of one pipeline stage."""
    if tp.size == 1 or dp.size == 1:
        alone = dp if tp.size == 1 else tp
        return Axis(alone.rank, alone.size, alone.group)
    stages = collectives.gather_objects(pp.rank)  # over the job, once: whose stage is which
    ranks = [[rank for rank, stage in enumerate(stages) if stage == mine] for mine in range(pp.size)]
    return _axis(collectives.new_groups(ranks))
