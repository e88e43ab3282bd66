"""Where sample i comes from is a closed form; the share of a source keeps to the stated bound at every prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megastab.config.errors import UserError
from megastab.data.blend import PERIOD, Blend, open_blend, slots_per_source
from megastab.data.indexed import TokenFile
from megastab.data.prepare import prepare
from megastab.data.samples import PackedSamples
from megastab.data.tokenizer import Tokenizer

Make = Callable[..., TokenFile]
WEIGHTS = [[1.0], [0.5, 0.5], [0.7, 0.3], [1, 2, 4, 8, 16], [0.001, 0.999], [1 / 3, 1 / 3, 1 / 3], [5.0] * 12, [0.9999, 0.0001]]


def blend_of(numbered: Make, weights: list[float]) -> Blend:
    sources = [PackedSamples(numbered([200] * 3, f"source{number}"), 10, seed=1) for number in range(len(weights))]
    return Blend(sources, weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_share_of_every_prefix_is_within_the_bound(numbered: Make, weights: list[float]) -> None:
    blend = blend_of(numbered, weights)
    share = np.array(weights) / np.sum(weights)
    assert blend.counts.sum() == PERIOD
    owners = np.array([blend.locate(index)[0] for index in range(2 * PERIOD + 100)])
    prefix = np.arange(1, len(owners) + 1)
    for number, weight in enumerate(share):
        error = np.abs(np.cumsum(owners == number) - prefix * weight)
        assert (error <= (1 + len(weights) * weight) / 2 + prefix / PERIOD + 1e-9).all()


@pytest.mark.parametrize("weights", WEIGHTS[1:5], ids=str)
def test_every_source_is_read_in_order_without_gaps(numbered: Make, weights: list[float]) -> None:
    blend = blend_of(numbered, weights)
    places = [blend.locate(index) for index in range(2 * PERIOD + 100)]
    for number in range(len(weights)):
        inner = [place for owner, place in places if owner == number]
        assert inner == list(range(len(inner)))


def test_far_index_needs_no_walk(numbered: Make) -> None:
    blend = blend_of(numbered, [0.25, 0.75])
    assert blend.locate(10**15 * PERIOD)[1] in (10**15 * PERIOD // 4, 10**15 * PERIOD * 3 // 4)


def test_single_source_is_the_identity(numbered: Make) -> None:
    blend = blend_of(numbered, [0.3])
    assert [blend.locate(index) for index in range(PERIOD - 2, PERIOD + 3)] == [(0, index) for index in range(PERIOD - 2, PERIOD + 3)]
    assert np.array_equal(blend[77].tokens, blend.sources[0][77].tokens)


def test_weights_are_relative(numbered: Make) -> None:
    one, other = blend_of(numbered, [1, 3]), blend_of(numbered, [0.02, 0.06])
    assert [one.locate(index) for index in range(500)] == [other.locate(index) for index in range(500)]


def test_sample_and_trace_come_from_the_located_source(numbered: Make) -> None:
    blend = blend_of(numbered, [2, 1])
    for index in range(60):
        source, inner = blend.locate(index)
        assert np.array_equal(blend[index].tokens, blend.sources[source][inner].tokens)
        assert blend.trace(index) == blend.sources[source].trace(inner)
        assert blend.trace(index)[0] == f"source{source}"


@pytest.mark.parametrize("weights", WEIGHTS[:5], ids=str)
def test_first_epoch_ends_where_a_source_begins_again(numbered: Make, weights: list[float]) -> None:
    blend = blend_of(numbered, weights)
    stop = blend.first_epoch_samples
    places = [blend.locate(index) for index in range(stop + 1)]
    assert max(inner for _, inner in places[:stop]) < 59
    assert places[stop][1] == 59  # 600 tokens are 59 samples of 10


def test_impossible_weights_are_refused(numbered: Make) -> None:
    with pytest.raises(UserError, match=r"weight 1e-06 is below 1/65536"):
        slots_per_source([1.0, 1e-6])
    with pytest.raises(UserError, match="one positive weight per dataset"):
        blend_of(numbered, [1.0, -0.5])
    with pytest.raises(UserError, match="list of datasets is empty"):
        open_blend([], 10, 1)


def test_open_blend_opens_checks_and_keys_by_name(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "d", tokenizer.path, valid_fraction=0.2)
    entries = [(3.0, f"{tmp_path}/d_train"), (1.0, f"{tmp_path}/d_valid")]
    blend = open_blend(entries, 32, 7, tokenizer=tokenizer, vocab_size=512)
    assert [source.name for source in blend.sources] == ["d_train", "d_valid"]  # type: ignore[attr-defined]
    assert blend.counts.tolist() == [PERIOD * 3 // 4, PERIOD // 4]
    assert blend[0].tokens.shape == (33,) and blend[0].tokens.max() < 400
    with pytest.raises(UserError, match="vocab_size 128"):
        open_blend(entries, 32, 7, vocab_size=128)
