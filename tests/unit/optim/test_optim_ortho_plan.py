"""Completing cut rows: any cuts, also a row over four ranks, give the bits of one process."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megastab.optim.ortho_plan import Segment, cut_rows, plan_flat, spans
from megastab.optim.rotation import Rotation, rotation_of
from megastab.optim.row_step import Pace, Views
from tests.ranks import run_ranks

# (name, rows, width); width 0: not rotated. A single row of 768 lies on several ranks.
MATRICES = [("a", 7, 48), ("gain", 1, 0), ("b", 5, 20), ("row", 1, 768), ("c", 3, 64)]
LENGTHS = [rows * (width or 37) for _, rows, width in MATRICES]
TOTAL = sum(LENGTHS)
CUTS = {
    "quarters": (0, TOTAL // 4, TOTAL // 2, 3 * TOTAL // 4, TOTAL),
    "inner rows": (0, 100, 230, 400, TOTAL),
    "one row on four ranks": (0, 500, 700, 1000, TOTAL),
    "between rows": (0, 48 * 2, 48 * 7 + 37 + 20, TOTAL - 64, TOTAL),
    "a rank without a cut row": (0, 48 * 2, 48 * 4, 48 * 7 + 37 + 31, TOTAL),
    "a rank with nothing": (0, 100, 100, 900, TOTAL),
}
PACE = Pace(1e-2, 0.9, 0.95, 1e-8, 1, 0.1)


def segments(first: int, stop: int) -> list[Segment]:
    """Elements [first, stop) of all matrices laid end to end, as one rank's flat tensor."""
    out, begin = [], 0
    for (name, _, width), length in zip(MATRICES, LENGTHS, strict=True):
        low, high = max(first, begin), min(stop, begin + length)
        if low < high:
            out.append(Segment(name, low - first, low - begin, high - low, width, decays=name != "gain"))
        begin += length
    return out


def rotation_for(name: str, width: int) -> Rotation:
    return rotation_of("hadamard", 1, name, width)


def numbers(step: int) -> torch.Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(step))


def steps_on(first: int, stop: int, everyone: list[tuple[int, int]], mine: int, group: object) -> tuple[list[np.ndarray], int]:
    """Weights and moments of a share after three steps, and the elements it sent in each."""
    told = [spans(segments(*share)) for share in everyone]
    plan = plan_flat(segments(first, stop), rotation_for, told, mine, group)
    views = [numbers(0)[first:stop].clone(), torch.zeros(stop - first), torch.zeros(stop - first)]
    for step in range(1, 4):
        pace = Pace(PACE.lr, PACE.beta1, PACE.beta2, PACE.eps, step, PACE.decay)
        plan.update(Views(views[0], numbers(step)[first:stop], *views[1:]), pace)
    return [view.numpy() for view in views], 0 if plan.cuts is None else plan.cuts.send.numel()


def on_a_rank(cuts: tuple[int, ...]) -> tuple[list[np.ndarray], int]:
    from megastab.parallel import collectives

    shares, (rank, _) = list(itertools.pairwise(cuts)), collectives.world()
    return steps_on(*shares[rank], shares, rank, collectives.job_group())


@pytest.mark.parametrize("name", CUTS)
def test_any_cuts_give_the_bits_of_one_process(name: str) -> None:
    whole, _ = steps_on(0, TOTAL, [], 0, None)
    shares = run_ranks(4, on_a_rank, CUTS[name])
    for place, what in enumerate(("weights", "mean", "square")):
        assert np.array_equal(np.concatenate([share[place] for share, _ in shares]), whole[place]), what
    sent = [count for _, count in shares]
    assert (sum(sent) == 0) == (name == "between rows"), sent


def test_what_a_rank_sends_is_its_part_of_a_row_to_each_other_owner() -> None:
    (_, first), (_, second), (_, third), (_, fourth) = run_ranks(4, on_a_rank, CUTS["one row on four ranks"])
    begin = 48 * 7 + 37 + 100  # of the row of 768
    assert (first, second, third) == (3 * (500 - begin), 3 * 200, 3 * 300) and fourth == 3 * (begin + 768 - 1000)


def rows_on_a_rank(cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width, number) of every row updated here: the number places a row in its block of fixed shape."""
    from megastab.optim import ortho_plan

    seen, update = [], ortho_plan.step_rows

    def step_rows(views: Views, rotation: Rotation, first_row: int, pace: Pace) -> None:
        seen.extend((rotation.width, first_row + row) for row in range(views.gradient.shape[0]))
        update(views, rotation, first_row, pace)

    ortho_plan.step_rows = step_rows
    on_a_rank(cuts)
    return seen[: len(seen) // 3]  # of the first of three steps


def test_rows_are_known_by_their_number_in_the_matrix() -> None:
    seen = run_ranks(4, rows_on_a_rank, CUTS["inner rows"])
    assert {row for rank in seen for row in rank} == {(width, row) for _, rows, width in MATRICES if width for row in range(rows)}
    assert sum(map(len, seen)) > sum(rows for _, rows, width in MATRICES if width), "owners compute a cut row each"


def test_owners_that_do_not_make_a_row_whole_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="row 1 of a is not whole"):
        cut_rows([[("a", 0, 60, 48)], [("a", 61, 96, 48)]])
    with pytest.raises(RuntimeError, match="row 1 of a is not whole"):
        cut_rows([[("a", 0, 60, 48)], []])
