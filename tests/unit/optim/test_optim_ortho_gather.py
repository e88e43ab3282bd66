"""Gathering whole matrices (axes "both"): any shares, also copies, give the bits of one process; memory is bounded by one matrix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megastab.optim.ortho_gather import holdings, plan_matrices
from megastab.optim.ortho_plan import FlatPlan, plan_flat, spans
from megastab.optim.ortho_segment import Segment
from megastab.optim.rotation import COLUMNS, Rotation, rotation_of
from megastab.optim.row_step import Pace, Views
from tests.memory import PeakOfTensors
from tests.ranks import run_ranks

# (name, rows, width, rows are turned, columns are turned)
MATRICES = [("a", 6, 48, True, True), ("gain", 1, 37, False, False), ("b", 20, 16, True, True), ("tall", 7, 20, True, False),
            ("wide", 12, 8, False, True)]  # fmt: skip
LENGTHS = [rows * width for _, rows, width, *_ in MATRICES]
TOTAL = sum(LENGTHS)
CUTS = {
    "quarters": (0, TOTAL // 4, TOTAL // 2, 3 * TOTAL // 4, TOTAL),
    "one matrix on four ranks": (0, 400, 500, 600, TOTAL),
    "between matrices": (0, 288, 325, 325 + 320, TOTAL),
    "a rank with nothing": (0, 100, 100, 300, TOTAL),
}
STEPS = 3


def rotation_for(name: str, width: int) -> Rotation:
    return rotation_of("hadamard", 1, name, width)


def segments(first: int, stop: int) -> list[Segment]:
    """Elements [first, stop) of all matrices laid end to end, as one rank's flat tensor."""
    out, begin = [], 0
    for (name, rows, width, turns_rows, turns_columns), length in zip(MATRICES, LENGTHS, strict=True):
        low, high = max(first, begin), min(stop, begin + length)
        if low < high:
            left = rotation_for(name + COLUMNS, rows) if turns_columns else None
            is_rotated = turns_rows or turns_columns
            place = (name, low - first, low - begin, high - low)
            out.append(Segment(*place, width if is_rotated else 0, decays=is_rotated, left=left, turns_rows=turns_rows))
        begin += length
    return out


def numbers(step: int) -> torch.Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(step))


def steps_on(plan: FlatPlan, first: int, stop: int) -> list[np.ndarray]:
    """Weights and moments of a share after three steps."""
    views = [numbers(0)[first:stop].clone(), torch.zeros(stop - first), torch.zeros(stop - first)]
    for step in range(1, STEPS + 1):
        plan.update(Views(views[0], numbers(step)[first:stop], *views[1:]), Pace(1e-2, 0.9, 0.95, 1e-8, step, 0.1))
    return [view.numpy() for view in views]


def on_a_rank(shares: Sequence[tuple[int, int]], are_rows_cut: bool = True) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
    """A share's weights and moments, and for each exchange of a step what was sent to and received from each rank."""
    from megastab.parallel import collectives

    (rank, _), group, told = collectives.world(), collectives.job_group(), [segments(*share) for share in shares]
    gathered = plan_matrices(told[rank], rotation_for, [holdings(held) for held in told], rank, group)
    everyone = [spans(held) for held in told] if are_rows_cut else []
    plan = plan_flat(told[rank], rotation_for, everyone, rank, group, gathered=gathered)
    seen, exchange = [], collectives.exchange_rows

    def exchange_rows(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: object) -> object:
        seen.append((*send, *receive))
        return exchange(rows, send, receive, group)

    collectives.exchange_rows = exchange_rows  # type: ignore[assignment]
    return steps_on(plan, *shares[rank]), seen[: len(seen) // STEPS]


def whole() -> list[np.ndarray]:
    return steps_on(plan_flat(segments(0, TOTAL), rotation_for), 0, TOTAL)


@pytest.mark.parametrize("name", CUTS)
def test_any_cuts_give_the_bits_of_one_process(name: str) -> None:
    ranks = run_ranks(4, on_a_rank, list(itertools.pairwise(CUTS[name])))
    for place, (what, expected) in enumerate(zip(("weights", "mean", "square"), whole(), strict=True)):
        assert np.array_equal(np.concatenate([found[place] for found, _ in ranks]), expected), what
    assert any(seen for _, seen in ranks) == (name != "between matrices")


def test_copies_are_sent_once_and_stay_copies() -> None:
    """Two tensor-parallel halves held twice each; the last rank also holds a whole matrix that nobody needs."""
    half = 288 + 37 + 160  # the middle of b
    shares = [(0, half), (0, half), (half, TOTAL), (half, TOTAL)]
    ranks, expected = run_ranks(4, on_a_rank, shares, False), whole()
    for (found, seen), (first, stop) in zip(ranks, shares, strict=True):
        assert all(np.array_equal(mine, theirs[first:stop]) for mine, theirs in zip(found, expected, strict=True))
        assert len(seen) == 1, "b alone is gathered"
    sent = [seen[0][:4] for _, seen in ranks]
    assert sent == [(0, 0, 160, 160), (0, 0, 0, 0), (160, 160, 0, 0), (0, 0, 0, 0)], "the first holder sends"


def test_matrices_without_a_common_owner_are_gathered_together() -> None:
    """A chain of boundaries, as at ZeRO 1: two exchanges however many ranks there are."""
    names = [f"m{place}" for place in range(9)]
    left = rotation_for("left", 4)
    cuts = [20 * place for place in range(9 * 32 // 20 + 1)] + [9 * 32]
    everyone = []
    for first, stop in itertools.pairwise(cuts):
        places = [(name, max(first, 32 * i), min(stop, 32 * i + 32), 32 * i) for i, name in enumerate(names)]
        held = [Segment(name, low - first, low - at, high - low, 8, left=left) for name, low, high, at in places if low < high]
        everyone.append(holdings(held))
    plan = plan_matrices([], rotation_for, everyone, len(everyone), None)
    assert plan is not None and len(plan.names) == 9 and len(plan.rounds) == 2 and not plan.mine


def test_shares_that_do_not_make_a_matrix_whole_are_an_error() -> None:
    for everyone in ([[("a", 0, 60, 96)], [("a", 61, 96, 96)]], [[("a", 0, 60, 96)], []], [[("a", 0, 60, 96), ("a", 60, 96, 96)]]):
        with pytest.raises(RuntimeError, match="a of 96 elements is not whole"):
            plan_matrices([], rotation_for, everyone, 0, None)


BIG = (1024, 512)


def memory_on_a_rank(cut: int) -> tuple[int, int]:
    """Bytes a step holds at its worst, and what the plan says."""
    from megastab.parallel import collectives

    (rank, _), group, size = collectives.world(), collectives.job_group(), BIG[0] * BIG[1]
    shares, left = [(0, cut), (cut, size)], rotation_for("big" + COLUMNS, BIG[0])
    told = [[Segment("big", 0, first, stop - first, BIG[1], left=left)] for first, stop in shares]
    gathered = plan_matrices(told[rank], rotation_for, [holdings(held) for held in told], rank, group)
    plan, length = plan_flat(told[rank], rotation_for, gathered=gathered), shares[rank][1] - shares[rank][0]
    views = Views(*(torch.zeros(length) for _ in range(4)))
    plan.update(views, Pace(1e-2, 0.9, 0.95, 1e-8, 1))  # makes the workspaces, which are kept
    with PeakOfTensors() as counted:
        plan.update(views, Pace(1e-2, 0.9, 0.95, 1e-8, 2))
    return counted.peak, max(size for size, _ in plan.temporaries)


@pytest.mark.parametrize("cut", [1000, BIG[0] * BIG[1] // 2 + 100])
def test_memory_is_what_is_said_and_bounded_by_the_matrix(cut: int) -> None:
    matrix = 4 * BIG[0] * BIG[1]
    for peak, said in run_ranks(2, memory_on_a_rank, cut):
        assert said <= peak <= said + matrix / 50 and said <= 6 * matrix, (peak, said)
