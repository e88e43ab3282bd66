"""Each row is counted exactly once over (tp x pp), whatever holds copies of it: by our rule, and by the flag DeepSpeed reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megastab.parallel.grid import Grid, TensorParallel
from megastab.parallel.ownership import counts_here
from megastab.parallel.param_info import ParamInfo, Part, describe, info_of
from tests import jobs
from tests.layouts import GPT, LLAMA, Layout, config_of
from tests.ranks import run_ranks

Row = tuple[str, int, int, int]  # matrix, its rows, first row, rows


def counted_rows(config: dict[str, Any]) -> tuple[list[Row], list[Row], list[Row]]:
    """On a rank: all rows it holds, those it counts, and those DeepSpeed's own rule counts."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    job = jobs.start(config)
    held: list[Row] = []
    ours: list[Row] = []
    theirs: list[Row] = []
    for parameter in job.built.adapter.parameters():
        info = info_of(parameter)
        assert info is not None
        rows = [(part.name, part.global_rows, part.start, part.rows) for part in info.parts]
        held += rows
        if counts_here(parameter, job.grid.tp.rank):
            ours += rows
        if not getattr(parameter, "ds_pipe_replicated", False) and (is_model_parallel_parameter(parameter) or job.grid.tp.rank == 0):
            theirs += rows
    return held, ours, theirs


MODELS = {
    "llama": LLAMA,
    "gpt": GPT,
    "gqa2": {**LLAMA, "num_kv_heads": 2},
    "mqa": {**GPT, "num_kv_heads": 1},
    "tied": {**LLAMA, "tie_embeddings": True},
}
LAYOUTS = [Layout(2, tp=2), Layout(4, tp=4, sp=True), Layout(2, pp=2, accumulation=2), Layout(4, tp=2, pp=2, sp=True, accumulation=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt", "gqa2", "mqa", "tied"])
def test_every_row_is_counted_once(layout: Layout, model: str) -> None:
    ranks = run_ranks(layout.world, counted_rows, config_of(layout, model=MODELS[model]))
    sizes = {name: size for held, _, _ in ranks for name, size, _, _ in held}
    assert len(sizes) > 15
    for rule in (1, 2):
        times = {name: np.zeros(size, int) for name, size in sizes.items()}
        for rank in ranks:
            for name, _, first, rows in rank[rule]:
                times[name][first : first + rows] += 1
        assert {name for name, count in times.items() if (count != 1).any()} == set()


@pytest.mark.parametrize(("heads", "tensor", "shares"), [(4, 4, [0, 1, 2, 3]), (2, 4, [0, 0, 1, 1]), (1, 4, [0, 0, 0, 0]), (4, 2, [0, 2])])
def test_kv_heads_are_dealt_to_neighbours(heads: int, tensor: int, shares: list[int]) -> None:
    from megastab.parallel.grid import kv_copies

    copies = kv_copies(heads, tensor)
    parts = [Part.cut("k", "k", heads * 8, TensorParallel(rank, tensor), copies) for rank in range(tensor)]
    assert [part.start // 8 for part in parts] == shares
    assert {part.rows for part in parts} == {max(1, heads // tensor) * 8}


def test_names_and_decay_follow_the_parts() -> None:
    matrix = ParamInfo((Part.whole("a.q", "q", 4), Part.whole("a.k", "k", 2)), 0, 8)
    gain = ParamInfo((Part.whole("n", "norm", 8),))
    assert matrix.name == "a.q+a.k" and matrix.decays and not gain.decays
    assert not ParamInfo((Part.whole("b", "bias", 8),)).decays and ParamInfo((Part.whole("e", "embedding", 8),), width=2).decays


def test_flag_is_set_on_the_first_copy_of_a_cut_matrix_only() -> None:
    def flag(**facts: bool) -> bool:
        return describe(nn.Parameter(torch.zeros(1)), ParamInfo((Part.whole("x", "q", 1),), **facts)).tensor_model_parallel

    assert flag(is_sharded=True, is_first_copy=True)
    assert not flag(is_sharded=True, is_first_copy=False) and not flag(is_sharded=False, is_first_copy=True)


def test_foreign_parameters_follow_megatrons_convention() -> None:
    plain, cut, tied = (SimpleNamespace(**facts) for facts in ({}, {"tensor_model_parallel": True}, {"ds_pipe_replicated": True}))
    assert [counts_here(p, rank) for p in (plain, cut, tied) for rank in (0, 1)] == [True, False, True, True, False, False]


def test_a_lone_rank_is_the_whole_grid() -> None:
    grid = Grid()
    assert (grid.tp.size, grid.dp.size, grid.pp.size, grid.model.size) == (1, 1, 1, 1) and grid.tp.group is None and not grid.tp.sequence
