"""Our places and groups are DeepSpeed's and megatron-core's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks


def where_am_i(tensor: int, pipeline: int, context: int) -> dict[str, Any]:
    """On a rank: our place and groups, DeepSpeed's topology's and megatron-core's."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megastab.parallel.grid import Grid

    grid = Grid.create(tensor, pipeline, sequence=True, kv_heads=1, context=context)
    parallel_state.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)

    def members(group: Any) -> list[int]:
        return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)

    topology, rank = grid.topology(), dist.get_rank()
    coordinate = topology.get_coord(rank)

    def along(axis: str) -> list[int]:
        return next(ranks for ranks in topology.get_axis_comm_lists(axis) if rank in ranks) if topology.get_dim(axis) > 1 else [rank]

    return {
        "place": (grid.tp.rank, grid.dp.rank, grid.pp.rank),
        "deepspeed": (coordinate.model, coordinate.data, coordinate.pipe),
        "megatron": (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_rank(),
        ),
        "groups": [members(axis.group) for axis in (grid.tp, grid.dp, grid.pp)],
        "deepspeed_groups": [along("model"), along("data"), along("pipe")],
        "megatron_groups": [
            members(parallel_state.get_tensor_model_parallel_group()),
            members(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            members(parallel_state.get_pipeline_model_parallel_group()),
        ],
        "context": (grid.cp.rank, grid.samples.rank, grid.samples.size, members(grid.cp.group)),
        "megatron_context": (
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            members(parallel_state.get_context_parallel_group()),
        ),
        "model": members(grid.model.group),
        "megatron_model": members(parallel_state.get_model_parallel_group()),
        "model_rank": grid.model.rank,
        "copies": members(grid.tp.copies_group(tensor)),
        "sequence": grid.tp.sequence,
    }


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context"),
    [
        (2, 2, 1, 1),
        (2, 1, 2, 1),
        (2, 1, 1, 1),
        (4, 2, 2, 1),
        (4, 2, 1, 1),
        (4, 1, 2, 1),
        (4, 1, 1, 2),
        (4, 2, 1, 2),
        (4, 1, 2, 2),
        (8, 2, 1, 2),
    ],
)
def test_places_and_groups_agree(world: int, tensor: int, pipeline: int, context: int) -> None:
    ranks = run_ranks(world, where_am_i, tensor, pipeline, context)
    assert len({rank["place"] for rank in ranks}) == world
    for rank in ranks:
        assert rank["place"] == rank["deepspeed"] == rank["megatron"]
        assert rank["context"] == rank["megatron_context"]
        assert rank["groups"] == rank["deepspeed_groups"] == rank["megatron_groups"]
        assert sorted(rank["model"]) == sorted(rank["megatron_model"])
        assert rank["model"].index(ranks.index(rank)) == rank["model_rank"]
        assert rank["copies"] == rank["groups"][0], "one KV head: all tp ranks hold it"
        assert rank["sequence"] == (tensor > 1)


def bad_cut() -> str:
    from megastab.parallel.grid import Grid

    with pytest.raises(ValueError, match="2 ranks cannot be cut into tensor 3 x context 1 x pipeline 1") as caught:
        Grid.create(3)
    return str(caught.value)


def test_a_cut_that_leaves_ranks_over_is_refused() -> None:
    assert len(set(run_ranks(2, bad_cut))) == 1


def mpu_answers() -> dict[str, Any]:
    import torch.distributed as dist

    from megastab.parallel.grid import Grid

    mpu = Grid.create(2).mpu()
    return {
        "ranks": (mpu.get_model_parallel_rank(), mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()),
        "sizes": (mpu.get_model_parallel_world_size(), mpu.get_data_parallel_world_size()),
        "groups": [dist.get_process_group_ranks(g) for g in (mpu.get_model_parallel_group(), mpu.get_data_parallel_group())],
    }


def test_mpu_tells_deepspeed_real_groups_even_of_one() -> None:
    first, second = run_ranks(2, mpu_answers)
    assert first == {"ranks": (0, 0, 0), "sizes": (2, 1), "groups": [[0, 1], [0]]}
    assert second == {"ranks": (1, 1, 0), "sizes": (2, 1), "groups": [[0, 1], [1]]}


def pipeline_mpu() -> None:
    from megastab.parallel.grid import Grid

    with pytest.raises(ValueError, match="takes a topology"):
        Grid.create(1, 2).mpu()


def test_there_is_no_mpu_with_a_pipeline() -> None:
    run_ranks(2, pipeline_mpu)
