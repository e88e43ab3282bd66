from __future__ import annotations

import random
from itertools import combinations

import pytest

from megastab.parallel.partition import stage_bounds


def every_cut(layers: int, stages: int) -> list[list[int]]:
    return [[0, *inner, layers] for inner in combinations(range(1, layers), stages - 1)]


def stage_costs(costs: list[int], bounds: list[int]) -> list[int]:
    return [sum(costs[first:stop]) for first, stop in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_has_a_cheaper_costliest_stage(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice((0, 1, 3, 10, 40)) for _ in range(draw.randint(3, 10))]
    stages = draw.randint(1, min(5, len(costs)))
    cuts = [stage_costs(costs, bounds) for bounds in every_cut(len(costs), stages)]
    best = min((max(cut), sum(c * c for c in cut)) for cut in cuts)
    mine = stage_costs(costs, stage_bounds(costs, stages))
    assert (max(mine), sum(c * c for c in mine)) == best


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_every_stage_holds_a_layer_whatever_the_costs(stages: int) -> None:
    for costs in ([0, 0, 0, 0, 0], [0, 5, 5, 0, 1000], [1000, 0, 0, 0, 0]):
        bounds = stage_bounds(costs, stages)
        assert bounds[0] == 0 and bounds[-1] == 5
        assert all(first < stop for first, stop in zip(bounds, bounds[1:], strict=False))


def test_a_dear_head_does_not_pull_the_blocks_together() -> None:
    """Embedding, four blocks, norm, head: the head's stage is the costliest however the blocks are cut, so they are cut evenly."""
    assert stage_bounds([0, 10, 10, 10, 10, 0, 100], 3) == [0, 3, 5, 7]


def test_equal_cuts_put_less_on_early_stages() -> None:
    assert stage_bounds([1, 1, 1], 2) == [0, 1, 3]


def test_too_many_stages_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        stage_bounds([1, 1], 3)


def test_a_large_model_is_cut_at_once() -> None:
    """126 blocks over 16 stages: arithmetic, not a search."""
    costs = [0, *[100] * 126, 0, 260]
    assert max(stage_costs(costs, stage_bounds(costs, 16))) == 860  # 15 stages of 8 blocks, the head with the other 6
