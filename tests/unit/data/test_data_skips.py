"""Skip lists against the plainest definition: walk the stream one sample at a time."""

from __future__ import annotations

import random

import pytest
import torch

from megastab.data.batches import Batches
from megastab.data.skips import Skips
from tests.layouts import SyntheticSource


def walked(left_out: set[int], position: int, count: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < count:
        if position not in left_out:
            taken.append(position)
        position += 1
    return taken


def draw_ranges(draw: random.Random) -> list[tuple[int, int]]:
    firsts = [draw.randrange(60) for _ in range(draw.randrange(6))]
    return [(first, first + draw.randrange(8)) for first in firsts]


@pytest.mark.parametrize("seed", range(200))
def test_take_and_back_equal_a_walk(seed: int) -> None:
    draw = random.Random(seed)
    ranges = draw_ranges(draw)
    left_out = {sample for first, last in ranges for sample in range(first, last + 1)}
    skips = Skips.of(ranges)
    for position in range(70):
        count = draw.randrange(1, 20)
        assert skips.take(position, count).tolist() == walked(left_out, position, count)
        before = [sample for sample in range(position) if sample not in left_out]
        assert skips.back(position, count) == (before[-count] if len(before) >= count else 0)


def test_order_repetition_and_overlap_change_nothing() -> None:
    skips = Skips.of([(20, 29), (0, 3), (4, 5), (25, 31), (20, 22)])
    assert skips.ranges == ((0, 5), (20, 31))
    assert skips | skips == skips | Skips() == Skips.of([(0, 5)]) | Skips.of([(20, 31)]) == Skips.of(skips.ranges)
    assert skips.within(3, 22) == [[3, 5], [20, 22]] and skips.within(6, 19) == []


@pytest.mark.parametrize("layout", [(12, 1, 1), (3, 2, 2), (2, 2, 3), (1, 1, 12)], ids=str)
def test_a_step_has_the_same_samples_at_every_layout(layout: tuple[int, int, int]) -> None:
    micro_batch, accumulation, dp_size = layout
    skips, left_out = Skips.of([(5, 9), (14, 14), (30, 60)]), {*range(5, 10), 14, *range(30, 61)}
    expected = walked(left_out, 0, 36)
    rows: dict[int, list[torch.Tensor]] = {step: [torch.empty(0)] * (accumulation * dp_size) for step in range(3)}
    for rank in range(dp_size):
        sizes = {"micro_batch": micro_batch, "accumulation": accumulation, "dp_rank": rank, "dp_size": dp_size, "document_mask": False}
        batches = Batches(SyntheticSource(), skips=skips, **sizes)  # type: ignore[arg-type]
        for step in range(3):
            for number, batch in enumerate(batches.next_step()):
                rows[step][number * dp_size + rank] = batch.sample_ids
                assert batch.tokens[0].tolist() == SyntheticSource()[int(batch.sample_ids[0])].tokens[:-1].tolist()
            assert batches.last_step == (expected[12 * step], expected[12 * step + 11]) and batches.consumed == batches.last_step[1] + 1
    assert [int(sample) for step in range(3) for ids in rows[step] for sample in ids] == expected


def test_the_position_alone_says_where_to_go_on() -> None:
    sizes = {"micro_batch": 4, "accumulation": 1, "dp_rank": 0, "dp_size": 1, "document_mask": False, "skips": Skips.of([(3, 6), (9, 20)])}
    straight = Batches(SyntheticSource(), **sizes)  # type: ignore[arg-type]
    for _ in range(4):
        resumed = Batches(SyntheticSource(), start=straight.consumed, **sizes)  # type: ignore[arg-type]
        assert torch.equal(resumed.next_step()[0].sample_ids, straight.next_step()[0].sample_ids)
