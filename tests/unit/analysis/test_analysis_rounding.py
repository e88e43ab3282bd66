"""Rounding: the golden numbers, a number-by-number oracle, and the cases a scale can go wrong in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megastab.analysis.rounding import absmax, absmax_codes, largest, zeropoint, zeropoint_codes


def exactly(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_int8_absmax_golden_numbers() -> None:
    x = exactly(0.1, -0.2, 0.3, 0.4)
    found = absmax_codes(x)
    assert found.codes.tolist() == [32, -63, 95, 127] and found.scale.item() == pytest.approx(0.0031496063, rel=1e-8)
    torch.testing.assert_close(absmax(x), exactly(0.1007874, -0.1984252, 0.2992126, 0.4), rtol=0, atol=1e-7)  # 7 digits are given
    assert (absmax(x) - x).square().mean().item() == pytest.approx(9.300019e-7, rel=1e-6)


def test_int8_absmax_by_tensor_and_by_row() -> None:
    """13.10's matrix, with -0.21 for the 0.1 whose code by row is a tie."""
    x = torch.tensor([[-0.21, -0.2], [1.0, 12.7]], dtype=torch.float64)
    whole, rows = absmax_codes(x), absmax_codes(x, dims=1)
    assert whole.codes.tolist() == [[-2, -2], [10, 127]] and whole.scale.flatten().tolist() == pytest.approx([0.1])
    assert rows.codes.tolist() == [[-127, -121], [10, 127]] and rows.scale.flatten().tolist() == pytest.approx([0.21 / 127, 0.1])
    golden = torch.tensor([[0.1, -0.2], [1.0, 12.7]], dtype=torch.float64)
    assert absmax_codes(golden).codes.tolist() == [[1, -2], [10, 127]]
    assert absmax_codes(golden, dims=1).scale.flatten().tolist() == pytest.approx([0.0015748031, 0.1], rel=1e-7)


def test_four_bits_golden_numbers() -> None:
    x = exactly(-0.5, 0.0, 0.25, 1.0)
    found = zeropoint_codes(x)
    assert found.codes.tolist() == [0, 5, 7, 15] and found.zero.item() == 5 and found.scale.item() == pytest.approx(0.1)
    torch.testing.assert_close(zeropoint(x), exactly(-0.5, 0.0, 0.2, 1.0))
    symmetric = absmax_codes(x, bits=4)
    assert symmetric.codes.tolist() == [-4, 0, 2, 7] and symmetric.scale.item() == pytest.approx(1 / 7)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_every_number_goes_to_the_nearest_value_of_its_format(bits: int, axis: int | None) -> None:
    """The oracle lists the values a slice may take and picks the nearest to each number."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) + 0.3
    slices = [x.flatten()] if axis is None else list(x.unbind(1 - axis))
    for form in ("absmax", "zeropoint"):
        expected = []
        for part in slices:
            if form == "absmax":
                top = 2 ** (bits - 1) - 1
                values = torch.arange(-top, top + 1, dtype=torch.float64) * part.abs().max() / top
            else:
                low, high = min(0.0, part.min().item()), max(0.0, part.max().item())
                step = (high - low) / (2**bits - 1)
                values = (torch.arange(2**bits, dtype=torch.float64) - round(-low / step)) * step
            expected.append(values[(part[:, None] - values).abs().argmin(1)])
        wanted = expected[0].view(6, 40) if axis is None else torch.stack(expected, 1 - axis)
        found = absmax(x, bits, axis) if form == "absmax" else zeropoint(x, bits, axis)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_static_limit_cuts_what_lies_beyond_it() -> None:
    x = exactly(9.0, -9.0, 0.31)
    torch.testing.assert_close(absmax(x, 4, limit=torch.tensor(0.7)), exactly(0.7, -0.7, 0.3), rtol=1e-7, atol=0)  # the limit is fp32
    by_row = absmax(x.view(3, 1), 4, limit=exactly(9.0, 7.0, 0.7).view(3, 1))
    torch.testing.assert_close(by_row.flatten(), exactly(9.0, -7.0, 0.3))


def test_all_positive_and_all_negative_keep_zero_in_reach() -> None:
    assert zeropoint_codes(exactly(1.0, 1.5)).codes.tolist() == [10, 15]
    assert zeropoint_codes(exactly(-1.0, -1.5)).codes.tolist() == [5, 0]


def test_zeros_stay_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    for found in (absmax(x, 8, 1), zeropoint(x, 4, 1)):
        assert found[0].tolist() == [0.0, 0.0] and found[1, 0] == 1.0
    assert absmax(torch.zeros(3)).tolist() == zeropoint(torch.zeros(3)).tolist() == [0.0] * 3


def test_low_precision_is_rounded_in_fp32_and_comes_back_as_it_was() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert absmax(x).dtype == zeropoint(x).dtype == torch.bfloat16 and largest(x).dtype == torch.float32
    assert torch.equal(absmax_codes(x, dims=1).codes, absmax_codes(x.float(), dims=1).codes)
    assert torch.equal(zeropoint(x), zeropoint(x.float()).bfloat16())
