"""What is kept of an activation [T, D]: its largest entries, RMS, median and kurtosis, in a form that merges over ranks.

* top: the ``TOP`` entries of largest magnitude with their sign, token and channel, exactly. Of equal magnitudes the lowest
  (sample, position, channel) comes first, so that no layout picks another one.
* kurtosis (raw, a Gaussian has 3) across the channels of each token, averaged over tokens, first tokens of samples apart (arXiv
  2410.17174): E[(x - mean)^4] / E[(x - mean)^2]^2 with population moments. A constant token has none and is left out.
* median of |x|: the lower middle value, as ``torch.median``, from a histogram whose bins are 1/128 of an octave wide. Its relative error is
  at most ``MEDIAN_ERROR``, half a bin, for medians in [2^-20, 2^12); one outside is reported as the nearer end, and an exact 0 as 0.
* massive (arXiv 2402.17762): the largest magnitude is above 100 and at least 1000 medians, where the median is not 0.

Everything is computed from fp32 whatever the dtype; what leaves the device are sums in fp64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TOP = 3
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0  # arXiv 2402.17762, section 2; 2503.22329, section 3
# A bin is one value of the upper half of an fp32's bits: sign off, 8 bits of exponent, 7 of mantissa.
BINS_PER_OCTAVE = 128
LOWEST_OCTAVE, NUM_OCTAVES = -20, 32
NUM_BINS = BINS_PER_OCTAVE * NUM_OCTAVES
MEDIAN_ERROR = 0.5 / BINS_PER_OCTAVE
_FIRST_BIN = (127 + LOWEST_OCTAVE) * BINS_PER_OCTAVE
_UPPER = int(sys.byteorder == "little")  # which half of an fp32's bytes
_INFINITE = 255 * BINS_PER_OCTAVE
_SCALARS = ("zero", "below", "above", "nonfinite", "squares", "first", "num_first", "rest", "num_rest")
NUM_SUMS = NUM_BINS + len(_SCALARS)
CHUNK_ELEMENTS = 1 << 18  # of the fp32 workspace on CPU: a megabyte stays in its cache
ACCELERATOR_CHUNK_ELEMENTS = 1 << 24
CONSTANT = 1e-6  # of the largest entry: a spread below that is the rounding of the mean in fp32


class Sketch(NamedTuple):
    """One rank's share of an activation, on the activation's device."""

    sums: Tensor
    """[NUM_SUMS] fp64; shares add."""
    top: Tensor
    """[TOP, 4] fp64: magnitude, signed value, token, channel; a magnitude of -1 where there are fewer entries."""


class Entry(NamedTuple):
    """One entry of an activation and where it stands."""

    value: float
    """Signed."""
    sample: int
    """Global id of the sample."""
    position: int
    channel: int
    token: int
    """Id of the input token there."""


class Summary(NamedTuple):
    """An activation over all tokens looked at. What is not defined (no finite entries, constant tokens) is NaN."""

    top: tuple[Entry, ...]
    rms: float
    median: float
    kurtosis_first: float
    kurtosis_rest: float
    num_nonfinite: int

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return _size(self.top[0]) if self.top else math.nan

    @property
    def ratio(self) -> float:
        """Largest magnitude over median; NaN where the median is 0."""
        return self.largest / self.median if self.median > 0 else math.nan

    @property
    def is_massive(self) -> bool:
        """Whether the largest entry is a massive activation; undecided where its ratio is within ``MEDIAN_ERROR`` of 1000."""
        return is_massive(self.largest, self.median)


def is_massive(largest: float, median: float) -> bool:
    """The rule of arXiv 2402.17762; a median of 0 (padding, ReLU) makes no ratio, hence no massive activation."""
    return median > 0 and largest > MASSIVE and largest >= MASSIVE_RATIO * median


@torch.no_grad()
def sketch(x_TD: Tensor, first_token: int = 0, seq: int | None = None, first_position: int = 0) -> Sketch:
    """Look at one activation.

    Args:
        x_TD: [T, D], any floating dtype.
        first_token: place of its first row among the tokens of the micro-batch.
        seq: S; token t is position t % S of its sample. None: only token 0 is a first one.
        first_position: what those positions count from; above 0 none is a first one.
    """
    tokens, width = x_TD.shape
    keys = torch.zeros(1 << 15, dtype=torch.int64, device=x_TD.device)
    squares_T, kurtosis_T, largest_T = (torch.empty(tokens, dtype=torch.float32, device=x_TD.device) for _ in range(3))
    for rows in _chunks(tokens, width, x_TD.device):
        chunk = x_TD[rows].detach().to(torch.float32).contiguous()
        keys += _keys(chunk)
        largest_T[rows] = _largest(chunk)
        squares_T[rows], kurtosis_T[rows] = _row_moments(chunk, largest_T[rows])
    token_T = torch.arange(first_token, first_token + tokens, device=x_TD.device)
    is_first_T = (token_T == 0 if seq is None else token_T % seq == 0) & (first_position == 0)
    scalars = [*_counts(keys), squares_T.double().sum(), *_average(kurtosis_T, is_first_T), *_average(kurtosis_T, ~is_first_T)]
    bins = keys[_FIRST_BIN : _FIRST_BIN + NUM_BINS]
    return Sketch(torch.cat([bins.double(), torch.stack([s.double() for s in scalars])]), _top(x_TD.detach(), largest_T, first_token))


def summary(sums: Tensor, top: Iterable[Entry]) -> Summary:
    """From the sum of all ranks' sums (on the CPU) and all ranks' entries."""
    of = dict(zip(_SCALARS, sums[NUM_BINS:].tolist(), strict=True))
    elements = of["zero"] + of["below"] + of["above"] + float(sums[:NUM_BINS].sum())
    return Summary(
        top=largest_entries(top),
        rms=math.sqrt(of["squares"] / (elements + of["nonfinite"])) if elements else math.nan,
        median=_median(sums[:NUM_BINS], of),
        kurtosis_first=of["first"] / of["num_first"] if of["num_first"] else math.nan,
        kurtosis_rest=of["rest"] / of["num_rest"] if of["num_rest"] else math.nan,
        num_nonfinite=int(of["nonfinite"]),
    )


def largest_entries(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The ``TOP`` of largest magnitude; of equal ones the first in (sample, position, channel)."""
    return tuple(sorted(entries, key=lambda e: (-_size(e), e.sample, e.position, e.channel))[:TOP])


def _size(entry: Entry) -> float:
    return math.inf if math.isnan(entry.value) else abs(entry.value)


def kurtosis(x_TD: Tensor) -> Tensor:
    """[T, D] -> [T] fp32, raw kurtosis across channels; NaN for a constant row."""
    rows = x_TD.to(torch.float32)
    return _row_moments(rows, _largest(rows))[1]


def _chunks(tokens: int, width: int, device: torch.device) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    rows = max(1, elements // width)
    return (slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows))


def _keys(chunk: Tensor) -> Tensor:
    """[2^15] how many entries have each upper half of the bits of |x|."""
    upper = chunk.view(torch.int16).view(-1, 2)[:, _UPPER]
    return torch.bincount(upper & 0x7FFF, minlength=1 << 15)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1)  # vector_norm takes eight times as long on CPU


def _row_moments(rows: Tensor, largest_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares and kurtosis of each row, scaled by its largest entry so that no fourth power overflows."""
    width = rows.shape[1]
    mean_T1 = rows.mean(1, keepdim=True)
    centred = rows - mean_T1
    spread_T = _largest(centred)
    squared = centred.div_(spread_T[:, None]).square_()
    second_T = squared.mean(1)
    fourth_T = squared.square_().mean(1)
    kurtosis_T = torch.where(spread_T > CONSTANT * largest_T, fourth_T / second_T.square(), torch.nan)
    squares_T = width * (second_T * spread_T * spread_T + mean_T1[:, 0].square())
    # 0 / 0 of a constant row, whose squares are its mean's
    return torch.where(spread_T > 0, squares_T, width * mean_T1[:, 0].square()), kurtosis_T


def _counts(keys: Tensor) -> list[Tensor]:
    last = _FIRST_BIN + NUM_BINS
    return [keys[0], keys[1:_FIRST_BIN].sum(), keys[last:_INFINITE].sum(), keys[_INFINITE:].sum()]


def _average(kurtosis_T: Tensor, counts_T: Tensor) -> tuple[Tensor, Tensor]:
    is_defined_T = counts_T & torch.isfinite(kurtosis_T)
    return torch.where(is_defined_T, kurtosis_T.double(), 0.0).sum(), is_defined_T.sum()


def _top(x_TD: Tensor, largest_T: Tensor, first_token: int) -> Tensor:
    """The largest entries lie in the rows whose largest are largest; stable sorts break ties by token, then channel."""
    order_T = torch.sort(_magnitude(largest_T), descending=True, stable=True).indices
    rows_R = order_T[:TOP].sort().values
    values = x_TD[rows_R].float()
    magnitudes, order = torch.sort(_magnitude(values).flatten(), descending=True, stable=True)
    order = order[:TOP]
    found = torch.full((TOP, 4), -1.0, dtype=torch.float64, device=x_TD.device)
    width = x_TD.shape[1]
    columns = [magnitudes[:TOP], values.flatten()[order], rows_R[order // width] + first_token, order % width]
    found[: len(order)] = torch.stack([column.double() for column in columns], dim=1)
    return found


def _magnitude(x: Tensor) -> Tensor:
    return x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _median(bins: Tensor, of: dict[str, float]) -> float:
    below = of["zero"] + of["below"]
    finite = below + float(bins.sum()) + of["above"]
    if not finite:
        return math.nan
    rank = (finite - 1) // 2 + 1  # the lower middle one, counted from 1
    if rank <= of["zero"]:
        return 0.0
    if rank <= below:
        return 2.0**LOWEST_OCTAVE
    index = int(torch.searchsorted(bins.cumsum(0), torch.tensor(rank - below, dtype=bins.dtype)))
    if index == NUM_BINS:
        return 2.0 ** (LOWEST_OCTAVE + NUM_OCTAVES)
    octave, step = divmod(index, BINS_PER_OCTAVE)
    return 2.0 ** (LOWEST_OCTAVE + octave) * (1 + (step + 0.5) / BINS_PER_OCTAVE)
