from __future__ import annotations

import pytest
import torch

from megastab.analysis.kurtosis import ShapeWatch, gaussian, one_hot, profile
from megastab.analysis.own_model import subject_of
from megastab.analysis.top import _peaks
from tests.unit.analysis import planted
from tests.unit.analysis.test_analysis_massive import ours, theirs
from tests.unit.model_generate.tiny import tiny_model


def test_bounds_are_those_of_the_book() -> None:  # ALGORITHMS 13.6
    assert [one_hot(d) for d in (64, 512, 2048)] == pytest.approx([62.0158730, 510.0019569, 2046.0004885], abs=1e-6)
    assert gaussian(2048) == pytest.approx(2.9970717, abs=1e-7)


def test_positions_are_apart_and_constant_tokens_left_out() -> None:
    hidden = torch.zeros(2, 3, 8)
    hidden[:, 0, 7] = 8.0  # seven 0 and 8: 6.1428571
    hidden[0, 1] = torch.tensor([1.0, -1.0] * 4)  # 1
    hidden[1, 1] = 2.0  # constant: none
    hidden[:, 2] = torch.arange(8.0) - 20.0
    watch = ShapeWatch(subject_of(tiny_model(), "ours"), 3)
    watch.see(0, hidden)
    found = watch.read()
    first, rest, largest_first, largest_rest = found.rows()[0]
    values = torch.arange(8.0, dtype=torch.float64) - 3.5
    evenly = float((values**4).mean() / (values**2).mean() ** 2)
    assert (first, largest_first) == (pytest.approx(6.1428571, rel=1e-6), 8.0)
    assert rest == pytest.approx((1.0 + evenly) / 2, rel=1e-6) and largest_rest == ((1 + 2) / 2 + 20) / 2


def test_of_a_whole_model_it_is_the_definition() -> None:
    subject, windows = subject_of(tiny_model(), "ours"), torch.randint(3, 90, (4, 10))
    seen: list[torch.Tensor] = []
    with subject.watch(subject.blocks, lambda i, h: seen.append(h.double())):
        subject.run(windows)
    x_LBSD = torch.stack(seen)
    centred = x_LBSD - x_LBSD.mean(-1, keepdim=True)
    expected_LBS = centred.pow(4).mean(-1) / centred.square().mean(-1).square()
    found = profile(subject, windows, batch=3)
    torch.testing.assert_close(found.kurtosis_LS, expected_LBS.mean(1), rtol=1e-4, atol=0)  # fp32 moments of fp32 values
    torch.testing.assert_close(found.largest_LS, x_LBSD.abs().amax(-1).mean(1), rtol=1e-5, atol=0)  # another batch size


def test_one_planted_channel_is_all_of_the_first_token() -> None:
    for subject in (ours(1), theirs(1)):
        first, rest, largest_first, largest_rest = profile(subject, planted.windows(subject.vocab_size, 3, 20, bos=True)).rows()[1]
        assert first == pytest.approx(one_hot(32), rel=1e-4) and rest < 5.0 and largest_first > 4990 > 10 > largest_rest


def test_the_picture_of_a_wide_model_loses_no_peak() -> None:
    size_D = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    size_D[[17, 998]] = torch.tensor([50.0, 70.0])
    peaks = _peaks(size_D)
    assert len(peaks) <= 160 and {(17, 50.0), (998, 70.0)} <= set(peaks)
    assert _peaks(size_D[:100]) == [(i, float(x)) for i, x in enumerate(size_D[:100])]
