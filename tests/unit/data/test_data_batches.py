"""The samples of a step do not depend on the layout; position is one integer; evaluation counts each sample once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megastab.data.batches import Batches, MicroBatch, evaluation_batches
from megastab.data.blend import Blend
from megastab.data.indexed import TokenFile
from megastab.data.samples import PackedSamples

Make = Callable[..., TokenFile]
LAYOUTS = [(12, 1, 1), (1, 12, 1), (3, 2, 2), (2, 2, 3), (1, 1, 12)]  # micro-batch, accumulation, dp


@pytest.fixture
def blend(numbered: Make) -> Blend:
    files = [numbered([17, 40, 3, 9] * 8, "a"), numbered([5] * 60, "b")]
    return Blend([PackedSamples(file, 16, seed=5) for file in files], [2, 1])


def step_of_all_ranks(blend: Blend, layout: tuple[int, int, int], start: int = 0, **other: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """One step, by sample id."""
    micro_batch, accumulation, dp_size = layout
    rows = {}
    for dp_rank in range(dp_size):
        sizes = {"micro_batch": micro_batch, "accumulation": accumulation, "dp_rank": dp_rank, "dp_size": dp_size}
        batches = Batches(blend, **sizes, document_mask=True, start=start, **other)
        step = batches.next_step()
        assert len(step) == accumulation and batches.consumed == start + 12
        for number, batch in enumerate(step):
            assert batch.sample_ids[0] == start + (number * dp_size + dp_rank) * micro_batch
            for row, sample in enumerate(batch.sample_ids.tolist()):
                assert sample not in rows
                rows[sample] = (batch.tokens[row], batch.labels[row], batch.weights[row], batch.document_ids[row])
    return rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("start", [0, 36, 1001])
def test_step_holds_the_same_samples_at_every_layout(blend: Blend, layout: tuple[int, int, int], start: int) -> None:
    reference, rows = step_of_all_ranks(blend, LAYOUTS[0], start), step_of_all_ranks(blend, layout, start)
    assert sorted(rows) == list(range(start, start + 12))
    for sample, tensors in rows.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, reference[sample], strict=True))


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels", "weights", "sample_ids"))


def test_consumed_is_the_whole_position(blend: Blend) -> None:
    sizes = {"micro_batch": 3, "accumulation": 2, "dp_rank": 1, "dp_size": 2, "document_mask": False}
    straight = Batches(blend, **sizes)
    steps = [straight.next_step() for _ in range(20)]
    assert straight.consumed == 240  # several epochs of both sources
    for number in (1, 7, 19):
        resumed = Batches(blend, **sizes, start=12 * number)
        assert all(same(*pair) for pair in zip(resumed.next_step(), steps[number], strict=True))
    straight.consumed = 84  # a rewind
    assert all(same(*pair) for pair in zip(straight.next_step(), steps[7], strict=True))


def test_shapes_dtypes_and_shift(blend: Blend) -> None:
    batch = Batches(blend, micro_batch=3, accumulation=1, dp_rank=0, dp_size=1, document_mask=False).next_step()[0]
    assert batch.tokens.shape == batch.labels.shape == batch.weights.shape == (3, 16)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert batch.sample_ids.tolist() == [0, 1, 2] and batch.sample_ids.dtype == torch.int64
    assert batch.document_ids is None
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
    assert (batch.weights == 1).all()  # without a mask every target counts, also across documents
    assert (batch.tokens // 1000 != batch.labels // 1000).any()


def test_document_mask_takes_the_weight_of_foreign_targets(blend: Blend) -> None:
    batches = Batches(blend, micro_batch=4, accumulation=1, dp_rank=0, dp_size=1, document_mask=True)
    for _ in range(20):
        (batch,) = batches.next_step()
        is_same = batch.tokens // 1000 == batch.labels // 1000  # by construction of the data
        assert torch.equal(batch.weights, is_same.float())
        assert batch.document_ids is not None and batch.document_ids.dtype == torch.int32
        steps = batch.document_ids.diff(dim=1)
        assert (batch.document_ids[:, 0] == 0).all() and torch.equal(steps, 1 - is_same[:, :-1].int())


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (4, 3), (7, 2)], ids=str)
@pytest.mark.parametrize("wanted", [1, 10, 12, 1000])
@pytest.mark.parametrize("document_mask", [False, True])
def test_evaluation_counts_each_sample_once(numbered: Make, layout: tuple[int, int], wanted: int, document_mask: bool) -> None:
    micro_batch, dp_size = layout
    source = PackedSamples(numbered([50] * 8), 16, shuffle=False)  # 24 samples
    sizes = {"micro_batch": micro_batch, "dp_size": dp_size, "document_mask": document_mask}
    ranks = [evaluation_batches(source, wanted, dp_rank=dp_rank, **sizes) for dp_rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    counted = {}
    for rank in ranks:
        assert len(list(rank)) == len(list(rank)) == len(rank)  # can be iterated again
        for batch in rank:
            assert batch.tokens.shape == (micro_batch, 16)
            assert (batch.document_ids is not None) == document_mask
            for row, sample in enumerate(batch.sample_ids.tolist()):
                if batch.weights[row].any():
                    assert sample not in counted
                    counted[sample] = batch.tokens[row].tolist()
    expected = min(wanted, 24)
    assert counted == {sample: source[sample].tokens[:-1].tolist() for sample in range(expected)}
    assert len(ranks[0]) == -(-expected // (micro_batch * dp_size))


def test_evaluation_of_a_blend_stops_before_a_source_repeats(numbered: Make) -> None:
    sources = [PackedSamples(numbered([length], name), 16, shuffle=False) for name, length in (("a", 1601), ("b", 33))]
    blend = Blend(sources, [1, 1])
    rank = evaluation_batches(blend, 1000, micro_batch=2, dp_rank=0, dp_size=1, document_mask=False)
    assert rank.num_samples == 5  # a b a b a, and b has only two
    assert sum(int(batch.weights.any(dim=1).sum()) for batch in rank) == 5
