"""A sample is a pure function of its index; an epoch holds every token once; document ids tell the truth."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from megastab.config.errors import UserError
from megastab.data.indexed import TokenFile
from megastab.data.samples import PackedSamples, permutation

Make = Callable[..., TokenFile]
LENGTHS = [7, 1, 0, 30, 2, 2, 11, 0, 5, 64, 3]  # 125 tokens: 12 samples of 10 and 4 tokens over


def stream_of_epoch(packed: PackedSamples, epoch: int) -> np.ndarray:
    """The samples of an epoch laid back in the order of its stream."""
    epoch_samples = packed.first_epoch_samples
    samples = [packed[index] for index in range(epoch * epoch_samples, (epoch + 1) * epoch_samples)]
    following = {int(sample.tokens[0]): sample.tokens for sample in samples}
    first = (set(following) - {int(sample.tokens[-1]) for sample in samples}).pop()
    stream = [first]
    while stream[-1] in following:
        stream.extend(following[stream[-1]][1:].tolist())
    return np.array(stream)


def test_order_is_fixed_for_ever() -> None:
    # Golden: a change here would silently break the resume of every run in the world.
    assert permutation(10, "documents", 1234, 0, "c4").tolist() == [6, 7, 5, 3, 8, 4, 9, 2, 0, 1]
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000))
    assert permutation(1, "x").tolist() == [0]
    assert permutation(50, 1, "a").tolist() != permutation(50, 2, "a").tolist() != permutation(50, 1, "b").tolist()


def test_permutation_is_uniform() -> None:
    places = np.array([permutation(8, number) for number in range(4000)])
    counts = np.array([np.bincount(places[:, place], minlength=8) for place in range(8)])
    assert abs(counts - 500).max() < 105  # 5 standard deviations of a binomial count


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_epoch_is_every_document_whole_and_once(numbered: Make, epoch: int) -> None:
    packed = PackedSamples(numbered(LENGTHS), 10, seed=3)
    assert packed.first_epoch_samples == 12
    stream = stream_of_epoch(packed, epoch)
    assert len(stream) == len(set(stream.tolist())) == 121
    breaks = np.flatnonzero(np.diff(stream) != 1) + 1
    parts = np.split(stream, breaks)
    assert all(part[0] % 1000 == 0 for part in parts)
    assert all(len(part) == LENGTHS[part[0] // 1000] for part in parts[:-1])


def test_samples_and_documents_are_shuffled_anew_each_epoch(numbered: Make) -> None:
    packed = PackedSamples(numbered([11] * 200), 10, seed=3)
    orders = [[packed.trace(index)[1][0] for index in range(epoch * 219, (epoch + 1) * 219)] for epoch in range(3)]
    assert packed.first_epoch_samples == 219
    assert orders[0] != orders[1] != orders[2]
    streams = [stream_of_epoch(packed, epoch).tolist() for epoch in range(2)]
    assert streams[0] != streams[1]
    heads = [packed[index].tokens[0] for index in range(219)]
    assert heads != sorted(heads, key=streams[0].index)  # samples do not come in the order of the stream


def test_samples_of_a_lone_document_also_change_places_each_epoch(numbered: Make) -> None:
    packed = PackedSamples(numbered([501]), 10)
    heads = [[int(packed[index].tokens[0]) for index in range(epoch * 50, epoch * 50 + 50)] for epoch in range(3)]
    assert sorted(heads[0]) == sorted(heads[1]) == sorted(heads[2]) == list(range(0, 500, 10))
    assert heads[0] != heads[1] != heads[2]


def test_sample_does_not_depend_on_what_was_read_before(numbered: Make) -> None:
    forward = PackedSamples(numbered(LENGTHS), 10, seed=3)
    expected = [forward[index] for index in range(100)]
    for index in np.random.default_rng(0).permutation(100):
        fresh = PackedSamples(numbered(LENGTHS), 10, seed=3)[int(index)]
        jumping = forward[int(index)]
        for field in ("tokens", "document_ids", "is_same_document"):
            assert np.array_equal(getattr(fresh, field), getattr(expected[index], field))
            assert np.array_equal(getattr(jumping, field), getattr(expected[index], field))


def test_seed_and_name_change_the_order_but_the_folder_does_not(numbered: Make) -> None:
    def order(prefix: str, seed: int, name: str | None = None) -> list[list[int]]:
        packed = PackedSamples(numbered([20] * 50, prefix), 10, seed, name)
        return [packed[index].tokens.tolist() for index in range(20)]

    reference = order("here/c4", 1)
    assert order("there/c4", 1) == order("x", 1, "c4") == reference
    assert order("here/c4", 2) != reference != order("here/pile", 1)


def test_document_ids_and_targets_against_the_tokens(numbered: Make) -> None:
    packed = PackedSamples(numbered(LENGTHS), 10, seed=3)
    for index in range(36):
        tokens, ids, is_same = packed[index]
        assert (tokens.dtype, ids.dtype, is_same.dtype) == (np.int64, np.int32, np.bool_)
        assert (tokens.shape, ids.shape, is_same.shape) == ((11,), (10,), (10,))
        documents = tokens // 1000  # by construction of the data
        assert np.array_equal(is_same, documents[1:] == documents[:-1])
        assert ids[0] == 0
        assert np.array_equal(np.diff(ids), documents[1:10] != documents[:9])
        assert packed.trace(index)[1] == list(dict.fromkeys(documents.tolist()))


def test_evaluation_is_file_order_and_one_epoch(numbered: Make) -> None:
    file = numbered(LENGTHS)
    packed = PackedSamples(file, 10, shuffle=False)
    for index in range(12):
        assert packed[index].tokens.tolist() == file.tokens[index * 10 : index * 10 + 11].tolist()
    with pytest.raises(IndexError):
        packed[12]


def test_negative_index_is_refused(numbered: Make) -> None:
    with pytest.raises(IndexError):
        PackedSamples(numbered(LENGTHS), 10)[-1]


def test_exact_fit_is_one_sample_and_one_token_less_is_an_error(numbered: Make) -> None:
    assert PackedSamples(numbered([5, 6]), 10).first_epoch_samples == 1
    with pytest.raises(UserError, match="holds 10 tokens but one sample of seq_len 10 needs 11"):
        PackedSamples(numbered([5, 5]), 10)


def test_only_two_epochs_are_kept(numbered: Make) -> None:
    packed = PackedSamples(numbered(LENGTHS), 10)
    for index in range(0, 12 * 20, 5):
        packed[index]
    assert len(packed._epochs) == 2


def test_ten_million_documents_need_no_loop() -> None:
    lengths = np.full(10_000_000, 11)
    tokens = SimpleNamespace(__len__=None)  # construction must not touch the tokens
    packed = PackedSamples(TokenFile("x", tokens, np.arange(0, 110_000_000, 11), lengths), 10)  # type: ignore[arg-type]
    assert packed.first_epoch_samples == 10_999_999
