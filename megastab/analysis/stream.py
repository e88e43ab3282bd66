"""The residual stream after each block over all windows: sums and the entries that stand out, never the activations themselves.

Massive entries are found in each window h [S, D] by itself, as arXiv 2402.17762 defines them: |a| > 100 and |a| >= 1000 medians of |h|.
Their channels are therefore the union over all windows. Medians are ``telemetry.moments``' (relative error up to ``MEDIAN_ERROR``); an
entry within that of the threshold may be decided either way. A median of 0 makes no ratio and hence no massive entry.

Differs: the released code of arXiv 2503.22329 averages over samples before it looks, in fp16, and takes the channels of the first
sample alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from megastab.analysis.perplexity import batches
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError
from megastab.telemetry.moments import MASSIVE, MASSIVE_RATIO, TOP, Entry, Summary, is_massive, largest_entries, sketch, summary

MOST = 64  # massive entries located in one window; models have a handful


class Spot(NamedTuple):
    """Massive entries of one channel on one kind of token."""

    channel: int
    is_first: bool
    """Whether they stand at the first position of a window."""
    token: int
    num_entries: int
    mean: float
    """Of the signed values."""
    largest: Entry


class Layer(NamedTuple):
    """The stream after one block."""

    seen: Summary
    """Over all windows at once; of entries at the same position and channel only the largest is in its top."""
    mean_top: tuple[float, ...]
    """A window's first, second and third largest magnitude, averaged over windows: what the papers draw."""
    mean_median: float
    spots: tuple[Spot, ...]
    num_windows: int
    num_massive_windows: int
    """Windows that hold a massive entry."""


class StreamWatch:
    """What :meth:`see` is shown, summed."""

    def __init__(self, num_layers: int):
        self.window_BS = torch.empty(0, 0, dtype=torch.int64)
        """The windows of the forward pass under way."""
        self.first_window = 0
        self._layers = [_Sums() for _ in range(num_layers)]

    def see(self, layer: int, hidden_BSD: Tensor) -> None:
        """One layer of one forward pass."""
        for b, hidden_SD in enumerate(hidden_BSD):
            self._layers[layer].add(hidden_SD, self.first_window + b, self.window_BS[b])

    def layers(self) -> list[Layer]:
        """What was seen, layer by layer."""
        return [sums.read() for sums in self._layers]


class _Sums:
    """One layer."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.entries: tuple[Entry, ...] = ()
        self.tops, self.medians = [0.0] * TOP, 0.0
        self.windows: Counter[bool] = Counter()
        self.spots: dict[tuple[int, bool, int], list[Entry]] = {}
        self.num_at: Counter[tuple[int, bool, int]] = Counter()
        self.total_at: defaultdict[tuple[int, bool, int], float] = defaultdict(float)

    def add(self, hidden_SD: Tensor, window: int, tokens_S: Tensor) -> None:
        found = sketch(hidden_SD, seq=hidden_SD.shape[0])
        sums = found.sums.cpu()
        top = [row for row in found.top.tolist() if row[0] >= 0]
        median = summary(sums, ()).median
        self.sums = sums if self.sums is None else self.sums.add_(sums)
        self.entries = _largest_places([*self.entries, *(_entry(row[1:], window, tokens_S) for row in top)])
        self.tops = [total + row[0] for total, row in zip(self.tops, top, strict=False)]
        self.medians += median
        rows = massive_entries(hidden_SD, median) if top and is_massive(top[0][0], median) else []
        self.windows[bool(rows)] += 1
        for row in rows:
            entry = _entry(row, window, tokens_S)
            key = (entry.channel, entry.position == 0, entry.token)
            self.num_at[key] += 1
            self.total_at[key] += entry.value
            self.spots[key] = list(largest_entries([*self.spots.get(key, []), entry])[:1])

    def read(self) -> Layer:
        if self.sums is None:
            raise UserError("a block was never called: the list given by --blocks is not what the model runs")
        number = sum(self.windows.values())
        spots = [Spot(*key, self.num_at[key], self.total_at[key] / self.num_at[key], held[0]) for key, held in self.spots.items()]
        spots.sort(key=lambda spot: -abs(spot.largest.value))
        means = tuple(total / number for total in self.tops)
        return Layer(summary(self.sums, self.entries), means, self.medians / number, tuple(spots), number, self.windows[True])


def _entry(row: list[float], window: int, tokens_S: Tensor) -> Entry:
    """Of (signed value, position, channel)."""
    value, position, channel = row[0], int(row[1]), int(row[2])
    return Entry(value, window, position, channel, int(tokens_S[position]))


def _largest_places(entries: list[Entry]) -> tuple[Entry, ...]:
    """The largest at different places. A place among the largest of all windows is among the largest of the window it is largest in."""
    at: dict[tuple[int, int], Entry] = {}
    for entry in entries:
        where = entry.position, entry.channel
        at[where] = largest_entries([entry, at.get(where, entry)])[0]
    return largest_entries(at.values())


def massive_entries(hidden_SD: Tensor, median: float) -> list[list[float]]:
    """(signed value, position, channel) of the entries of a window that pass the rule, the largest first, at most ``MOST``."""
    if not median > 0:
        return []
    low_S, high_S = hidden_SD.aminmax(dim=1)
    rows_R = _passes(torch.maximum(high_S, -low_S).float(), median).nonzero()[:, 0]
    values = hidden_SD[rows_R].float().flatten()
    top = values.abs().topk(min(MOST, len(values)))
    places, width = top.indices[_passes(top.values, median)], hidden_SD.shape[1]
    found = zip(values[places].tolist(), rows_R[places // width].tolist(), (places % width).tolist(), strict=True)
    return [list(entry) for entry in found]


def _passes(sizes: Tensor, median: float) -> Tensor:
    return (sizes > MASSIVE) & (sizes >= MASSIVE_RATIO * median)


def median_of(hidden_SD: Tensor) -> float:
    """Median of |h| of one window."""
    return summary(sketch(hidden_SD, seq=hidden_SD.shape[0]).sums.cpu(), ()).median


def look(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "stream") -> list[Layer]:
    """The residual stream after each block, over all windows. The hooks are gone afterwards.

    Raises:
        UserError: what a layer gives is not finite in the weights' dtype.
    """
    watch = StreamWatch(len(subject.blocks))
    with subject.watch(subject.blocks, watch.see):
        for window_BS in batches(windows_NS, batch, label):
            watch.window_BS = window_BS
            subject.run(window_BS)
            watch.first_window += window_BS.shape[0]
    found = watch.layers()
    for layer, place in enumerate(found):
        check_finite(subject, layer, place.seen.num_nonfinite)
    return found


def check_finite(subject: Subject, layer: int, num_nonfinite: int) -> None:
    """Refuse what has no statistics: fp16 ends at 65504, below what some models reach (Gemma 3 12B: 774144)."""
    if num_nonfinite:
        dtype = str(subject.dtype).removeprefix("torch.")
        how = "its weights or its input are broken" if subject.dtype == torch.float32 else "use --dtype fp32"
        raise UserError(f"{subject.name}: {num_nonfinite} values behind layer {layer} are not finite in {dtype}: {how}")


def first_massive(layers: list[Layer]) -> int | None:
    """The first layer after which a window holds a massive entry."""
    return next((i for i, layer in enumerate(layers) if layer.spots), None)
