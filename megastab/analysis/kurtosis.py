"""How far the residual stream is from Gaussian: kurtosis and largest magnitude by layer and position (arXiv 2410.17174, section 3).

Raw kurtosis across the D channels of each token, in fp32 (``telemetry.moments``): 3 (D - 1) / (D + 1) for Gaussian channels, at most
D - 2 + 1 / (D - 1), where one channel is all. Averaged over windows, the first position apart; tokens whose channels are all equal have
none and are left out. Not excess, and not over tokens.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megastab.analysis import arguments as shared
from megastab.analysis.output import Table, new_figure, plain_log, whole_numbers
from megastab.analysis.perplexity import batches
from megastab.analysis.stream import check_finite
from megastab.analysis.subject import Subject
from megastab.telemetry.moments import kurtosis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST, REST = "#B2182B", "#4C78A8"


class Profile(NamedTuple):
    """Means over windows, [L, S] fp64: layers and positions."""

    kurtosis_LS: Tensor
    """NaN where no window has one."""
    largest_LS: Tensor

    def rows(self) -> list[tuple[float, float, float, float]]:
        """By layer: kurtosis of the first position and of the rest, largest magnitude of both."""
        pairs = [(values[:, 0], values[:, 1:].nanmean(1)) for values in self]
        return [(float(a), float(b), float(c), float(d)) for a, b, c, d in zip(*pairs[0], *pairs[1], strict=True)]


class ShapeWatch:
    """Sums over windows by layer and position."""

    def __init__(self, subject: Subject, seq: int):
        self.subject = subject
        self.sums = torch.zeros(3, len(subject.blocks), seq, dtype=torch.float64)  # kurtosis, how many have one, largest
        self.num_windows = 0

    def see(self, layer: int, hidden_BSD: Tensor) -> None:
        """One layer of one forward pass."""
        if layer == 0:
            self.num_windows += hidden_BSD.shape[0]
        for hidden_SD in hidden_BSD:
            low_S, high_S = hidden_SD.aminmax(dim=1)
            largest_S = torch.maximum(high_S, -low_S).double()
            check_finite(self.subject, layer, int((~largest_S.isfinite()).sum()))
            kurtosis_S = kurtosis(hidden_SD).double()
            is_defined_S = kurtosis_S.isfinite()
            found = torch.stack([torch.where(is_defined_S, kurtosis_S, 0.0), is_defined_S.double(), largest_S])
            self.sums[:, layer] += found.cpu()

    def read(self) -> Profile:
        """What was seen."""
        return Profile(self.sums[0] / self.sums[1], self.sums[2] / self.num_windows)


def profile(subject: Subject, windows_NS: Tensor, batch: int = 1, label: str = "kurtosis") -> Profile:
    """Of the residual stream after each block."""
    watch = ShapeWatch(subject, windows_NS.shape[1])
    with subject.watch(subject.blocks, watch.see):
        for window_BS in batches(windows_NS, batch, label):
            subject.run(window_BS)
    return watch.read()


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments), shared.output_of(arguments)
    found = {}
    for bos in shared.settings_of(arguments, subject):
        name = shared.setting_name(bos)
        found[name] = profile(subject, shared.windows_of(arguments, subject, bos), arguments.batch, name)
    data: dict[str, object] = {name: _data(seen) for name, seen in found.items()}
    data["gaussian"] = gaussian(subject.hidden_size)
    output.write("kurtosis", {"model": subject.name, **data}, [_table(subject, name, seen) for name, seen in found.items()])
    if output.folder is not None:
        output.picture("kurtosis", draw(subject, found))


def gaussian(width: int) -> float:
    """What D independent Gaussian channels have in the mean."""
    return 3.0 * (width - 1) / (width + 1)


def one_hot(width: int) -> float:
    """The most there can be: one channel is all."""
    return width - 2 + 1 / (width - 1)


COLUMNS = ("kurtosis, first", "kurtosis, rest", "largest, first", "largest, rest")


def _table(subject: Subject, name: str, seen: Profile) -> Table:
    rows = seen.rows()
    means = [float(torch.tensor(column).nanmean()) for column in zip(*rows, strict=True)]
    width = subject.hidden_size
    title = f"{subject.name}, {name}: first position and the rest (Gaussian {gaussian(width):.3f}, at most {one_hot(width):.1f})"
    return Table(title, ["layer", *COLUMNS], [*([i, *row] for i, row in enumerate(rows)), ["mean", *means]])


def _data(seen: Profile) -> dict[str, object]:
    names = ("kurtosis_first", "kurtosis_rest", "largest_first", "largest_rest")
    layers = [{"layer": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(seen.rows())]
    return {"layers": layers, "kurtosis_by_position": seen.kurtosis_LS.nanmean(0).tolist()}


def draw(subject: Subject, found: dict[str, Profile]) -> Figure:
    """By layer on the left, by position on the right; a row for each setting."""
    figure = new_figure(10.0, 0.6 + 3.0 * len(found))
    for panels, (name, seen) in zip(figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True):
        rows = seen.rows()
        for column, color, label in ((0, FIRST, "first position"), (1, REST, "the rest")):
            panels[0].plot([row[column] for row in rows], color=color, marker="o", markersize=4, label=label)
        panels[1].plot(seen.kurtosis_LS.nanmean(0).tolist(), color=REST, linewidth=1.2, label="mean over layers")
        for axes, where in zip(panels, ("after layer", "position"), strict=True):
            axes.axhline(gaussian(subject.hidden_size), color="#7F7F7F", linestyle=":", linewidth=1.0, label="Gaussian")
            axes.axhline(one_hot(subject.hidden_size), color="#7F7F7F", linestyle="--", linewidth=1.0, label="one channel is all")
            axes.set(yscale="log", xlabel=where, ylabel=f"kurtosis, {name}")
            whole_numbers(axes.xaxis)
            plain_log(axes.yaxis)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8)
    figure.suptitle(f"{subject.name}: kurtosis of the residual stream", fontsize=11)
    return figure


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    shared.add_bos_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("kurtosis", "kurtosis and largest magnitude, the first position apart", _add_arguments, _run)
