"""What is kept of an activation equals its definition, merges over any cut into ranks, and survives what bf16 or fp16 would not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megastab.telemetry import moments
from megastab.telemetry.moments import MEDIAN_ERROR, Entry, Summary, is_massive, kurtosis, sketch, summary


def entries(top: Tensor, seq: int, ids: list[int] | None = None) -> list[Entry]:
    """``ids`` names the samples; without it they are numbered."""
    found = []
    for magnitude, value, token, channel in top.tolist():
        if magnitude >= 0:
            sample, position = divmod(int(token), seq)
            found.append(Entry(value, sample if ids is None else ids[sample], position, int(channel), 0))
    return found


def look(x_TD: Tensor, seq: int | None = None) -> Summary:
    found = sketch(x_TD, 0, seq)
    return summary(found.sums.cpu(), entries(found.top, seq or len(x_TD)))


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # ALGORITHMS 13.6
        ([1.0, -1.0, 1.0, -1.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1.7),
        ([0.0] * 7 + [8.0], 6.1428571),
        ([1.0] + [0.0] * 63, 62.0158730),
        ([1.0] + [0.0] * 511, 510.0019569),
        ([1.0] + [0.0] * 2047, 2046.0004885),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 7e5, 1e12])  # fourth powers beyond fp32 both ways
def test_kurtosis_golden(row: list[float], expected: float, scale: float) -> None:
    # 1e-6: the mean and the moments are fp32, a few 6e-8 each
    assert float(kurtosis(torch.tensor([row]) * scale)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e7])
def test_constant_row_has_no_kurtosis_and_is_left_out(value: float) -> None:
    assert math.isnan(float(kurtosis(torch.full((1, 768), value))))
    x_TD = torch.full((4, 768), value)
    x_TD[2] = torch.arange(768.0)
    found = look(x_TD)
    assert math.isnan(found.kurtosis_first) and found.kurtosis_rest == pytest.approx(float(kurtosis(x_TD[2:3])), rel=1e-6)


def test_gaussian_kurtosis_is_three() -> None:
    x_TD = torch.randn(2000, 2048, generator=torch.Generator().manual_seed(0))
    # 4 standard errors of a kurtosis over 4 M draws: sqrt(24 / 4.1e6) = 2.4e-3 each
    assert look(x_TD).kurtosis_rest == pytest.approx(2.9970717, abs=0.01)


@pytest.mark.parametrize(
    ("values", "median", "said"),
    [  # ALGORITHMS 13.6, the tie aside
        ([0.1, 0.2, -0.3, 150.0, 0.05, 0.1], 0.1, True),
        ([0.2] * 9 + [199.9], 0.2, False),
        ([0.2] * 9 + [200.0], 0.2, True),
        ([0.05] * 9 + [99.0], 0.05, False),
        ([0.0] * 9 + [5000.0], 0.0, False),
        ([0.1] * 9 + [100.0], 0.1, False),  # above 100, not at it
    ],
)
def test_massive_by_the_rule(values: list[float], median: float, said: bool) -> None:
    assert is_massive(max(map(abs, values)), median) is said
    found = look(torch.tensor([values]))
    assert found.median == pytest.approx(median, rel=MEDIAN_ERROR)
    if abs(max(values) / 1000 - median) > MEDIAN_ERROR * median:  # elsewhere the histogram cannot tell
        assert found.is_massive is said


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(7, 33), (64, 512), (1, 2), (3, 1)])
def test_every_number_is_its_definition(shape: tuple[int, int], scale: float) -> None:
    draw = torch.Generator().manual_seed(shape[1])
    x_TD = torch.randn(*shape, generator=draw) * scale + 0.3 * scale
    found, exact = look(x_TD), x_TD.double()
    assert found.median == pytest.approx(float(x_TD.abs().median()), rel=MEDIAN_ERROR)
    assert found.rms == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-6)
    order = x_TD.abs().flatten().argsort(descending=True)[:3].tolist()
    assert [(e.position, e.channel) for e in found.top] == [divmod(i, shape[1]) for i in order]
    assert [e.value for e in found.top] == [float(x_TD.flatten()[i]) for i in order], "exactly, with their sign"
    assert found.num_nonfinite == 0


def test_median_error_is_within_its_bound_everywhere() -> None:
    worst = 0.0
    for value in np.concatenate([np.geomspace(1.01e-6, 4000.0, 997), 2.0 ** np.arange(-19, 12)]).astype(np.float32).tolist():
        worst = max(worst, abs(look(torch.tensor([[value, value, 5000.0]])).median / value - 1))
    assert MEDIAN_ERROR / 2 < worst <= MEDIAN_ERROR * (1 + 1e-12) < 0.005


def test_medians_beyond_the_bins_are_their_ends() -> None:
    assert look(torch.full((1, 5), 1e-9)).median == 2.0**-20
    assert look(torch.full((1, 5), 1e5)).median == 2.0**12
    assert look(torch.tensor([[0.0, 0.0, 0.0, 1.0, -2.0]])).median == 0.0


def test_first_tokens_are_apart_in_every_sample() -> None:
    x_TD = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    x_TD[0, 3], x_TD[4, 3], x_TD[8, 3] = 50.0, 60.0, -70.0
    found, by_token = look(x_TD, seq=4), kurtosis(x_TD).double()
    assert found.kurtosis_first == pytest.approx(float(by_token[[0, 4, 8]].mean()), rel=1e-7)
    assert found.kurtosis_rest == pytest.approx(float(by_token[[1, 2, 3, 5, 6, 7, 9, 10, 11]].mean()), rel=1e-7)
    assert [(e.value, e.sample, e.position, e.channel) for e in found.top] == [(-70.0, 2, 0, 3), (60.0, 1, 0, 3), (50.0, 0, 0, 3)]


@pytest.mark.parametrize("cuts", [(6, 18), (1, 5, 6, 7, 23)])
@pytest.mark.parametrize("rounded", [False, True])
def test_any_cut_into_ranks_merges_to_the_whole(cuts: tuple[int, ...], rounded: bool) -> None:
    x_TD = torch.randn(24, 40, generator=torch.Generator().manual_seed(2)) * 4
    if rounded:  # ties everywhere: every layout must pick the same ones
        x_TD = x_TD.round()
    whole = look(x_TD, seq=6)
    starts, stops = (0, *cuts), (*cuts, 24)
    parts = [sketch(x_TD[a:b], a, 6) for a, b in zip(starts, stops, strict=True)]
    merged = summary(torch.stack([p.sums for p in parts]).sum(0), [e for p in reversed(parts) for e in entries(p.top, 6)])
    assert merged.top == whole.top and merged.median == whole.median
    # sums in fp64 of the same fp32 rows
    assert np.allclose(merged[1:], whole[1:], rtol=1e-12, atol=0)


def test_equal_magnitudes_are_told_in_order_of_tokens() -> None:
    found = look(torch.tensor([[5.0, -4.0, 0.0], [9.0, 4.0, 1.0]]))
    assert [(e.value, e.position, e.channel) for e in found.top] == [(9.0, 1, 0), (5.0, 0, 0), (-4.0, 0, 1)]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    whole = look(x_TD, seq=10)
    monkeypatch.setattr(moments, "CHUNK_ELEMENTS", 7 * 16)
    assert look(x_TD, seq=10) == whole


def test_low_precision_is_lifted_before_anything() -> None:
    x_TD = torch.full((4, 256), 0.5)
    x_TD[1, 7], x_TD[:, ::2] = 60000.0, -0.5
    for dtype in (torch.float16, torch.bfloat16):
        found = look(x_TD.to(dtype))
        lifted = look(x_TD.to(dtype).float())
        assert found == lifted and found.is_massive and math.isfinite(found.rms) and found.kurtosis_rest > 50


def test_what_is_not_finite_is_counted_and_spoils_no_other_token() -> None:
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    clean = look(x_TD)
    x_TD[3, 5], x_TD[3, 6], x_TD[3, 7] = math.inf, -math.inf, math.nan
    found = look(x_TD)
    assert found.num_nonfinite == 3 and found.largest == math.inf
    assert [(abs(e.value) == math.inf or math.isnan(e.value), e.position, e.channel) for e in found.top] == [
        (True, 3, c) for c in (5, 6, 7)
    ]
    assert math.isfinite(found.kurtosis_rest) and found.kurtosis_first == clean.kurtosis_first
    assert found.median == pytest.approx(float(x_TD.abs()[torch.isfinite(x_TD)].median()), rel=MEDIAN_ERROR)
    assert not math.isfinite(look(torch.full((2, 3), math.nan)).median)
