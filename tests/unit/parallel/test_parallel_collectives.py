"""The collectives: what they compute, that a group of None sends nothing, and that a failure ends every rank with one message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megastab.config.errors import UserError
from megastab.parallel import collectives
from tests.ranks import run_ranks


def collective_results() -> dict[str, Any]:
    from megastab.parallel.grid import Grid

    group = Grid.create(2).tp.group
    rank, world = collectives.world()
    mine = torch.arange(4.0).view(4, 1) + 10 * rank
    total = mine.clone()
    collectives.sum_(total, group)
    largest = mine.clone()
    collectives.max_(largest, group)
    gathered, gathering = collectives.gather_rows(mine, group, async_op=True)
    collectives.wait(gathering)
    share, _ = collectives.scatter_rows_sum(mine, group)
    many = [mine.to(torch.bfloat16), mine.double(), torch.tensor([0.1 + rank], requires_grad=True)]
    collectives.sum_coalesced_(many, group)
    return {
        "world": (rank, world),
        "sum": total.flatten().tolist(),
        "max": largest.flatten().tolist(),
        "gathered": gathered.flatten().tolist(),
        "share": share.flatten().tolist(),
        "coalesced": [t.flatten().tolist() for t in many],
        "dtypes": [str(t.dtype) for t in many],
        "scalars": collectives.sum_scalars([1.0 + rank, 1e-17 * rank], group),
        "objects": collectives.gather_objects({"rank": rank}),
    }


def test_collectives_compute_what_they_say() -> None:
    for rank, found in enumerate(run_ranks(2, collective_results)):
        assert found["world"] == (rank, 2)
        assert found["sum"] == [10, 12, 14, 16] and found["max"] == [10, 11, 12, 13]
        assert found["gathered"] == [0, 1, 2, 3, 10, 11, 12, 13]
        assert found["share"] == ([10, 12], [14, 16])[rank]
        assert found["coalesced"][:2] == [[10, 12, 14, 16]] * 2 and found["coalesced"][2] == pytest.approx([1.2])
        assert found["dtypes"] == ["torch.bfloat16", "torch.float64", "torch.float32"]
        assert found["scalars"] == [3.0, 1e-17], "fp64"
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]


def test_a_group_of_none_is_this_rank_alone() -> None:
    x = torch.arange(3.0)
    assert collectives.sum_(x, None) is None and collectives.gather_rows(x, None) == (x, None)
    assert collectives.scatter_rows_sum(x, None) == (x, None) and collectives.sum_scalars([1.5], None) == [1.5]
    collectives.max_(x, None)
    collectives.sum_coalesced_([x], None)
    collectives.wait(None)
    assert x.tolist() == [0, 1, 2] and collectives.group_size(None) == 1 and collectives.rank_in(None) == 0
    assert collectives.world() == (0, 1) and collectives.gather_objects("x") == ["x"]
    assert collectives.new_groups([[0], [1]]) is None
    collectives.barrier()
    collectives.leave()


def uneven_rows() -> None:
    from megastab.parallel.grid import Grid

    with pytest.raises(ValueError, match="3 rows cannot be cut into 2 equal shares"):
        collectives.scatter_rows_sum(torch.zeros(3, 1), Grid.create(2).tp.group)


def test_rows_that_do_not_divide_are_refused() -> None:
    run_ranks(2, uneven_rows)


def failing(which: list[int]) -> tuple[str, str]:
    """On a rank: how a block ends when the ranks in ``which`` raise."""
    rank = collectives.world()[0]
    try:
        with collectives.together("reading"):
            if rank in which:
                raise UserError(f"no file on {rank}")
    except (UserError, collectives.PeerFailed) as error:
        return type(error).__name__, str(error)
    return "done", ""


@pytest.mark.parametrize("which", [[0], [1], [2], [1, 2], [0, 1, 2]], ids=str)
def test_one_failure_ends_every_rank_and_is_told_once(which: list[int]) -> None:
    ends = run_ranks(3, failing, which)
    teller = which[0]
    assert ends[teller] == ("UserError", f"no file on {teller}")
    others = [end for rank, end in enumerate(ends) if rank != teller]
    assert others == [("PeerFailed", f"rank {teller} failed while reading: no file on {teller}")] * 2


def test_without_a_failure_every_rank_goes_on() -> None:
    assert run_ranks(3, failing, []) == [("done", "")] * 3


def test_alone_the_error_is_the_error() -> None:
    with pytest.raises(UserError, match="no file on 0"), collectives.together("reading"):
        raise UserError("no file on 0")


def test_other_errors_are_not_delayed() -> None:
    with pytest.raises(ZeroDivisionError), collectives.together("reading"):
        1 / 0  # noqa: B018
