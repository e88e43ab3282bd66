"""Ratios over steps with their curves, a panel a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megastab.analysis.dynamics_fit import Fit
from megastab.analysis.dynamics_forecast import Forecast
from megastab.analysis.dynamics_series import Series
from megastab.analysis.output import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS, FITTED, EARLY, CUT = "#4C78A8", "#E45756", "#F58518", "#7F7F7F"
COLUMNS, PANELS = 3, 24
DECADE = 10.0  # a panel whose ratios lie further apart is logarithmic


@dataclass(frozen=True)
class Layer:
    """All that is known of one."""

    series: Series
    fit: Fit | None
    failure: str
    """Why there is no fit."""
    early: Forecast


def draw(name: str, layers: list[Layer]) -> Figure:
    """At most ``PANELS`` layers, evenly chosen, the first and the last among them."""
    chosen = layers
    if len(layers) > PANELS:
        chosen = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, PANELS)]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(3.6 * columns, 0.9 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes, layer in zip(panels, chosen, strict=False):
        _panel(axes, layer)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(chosen) - columns) : len(chosen)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)  # also where the panel below it is left out
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"{name}: largest over median activation", x=0.01, ha="left", fontsize=10, parse_math=False)
    return figure


def _panel(axes: Axes, layer: Layer) -> None:
    series, until = layer.series, layer.early.until
    axes.set_title(f"layer {layer.series.layer}" + ("" if layer.fit else ": no fit"), loc="left", fontsize=9)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not series.steps:
        return
    axes.plot(series.steps, series.ratios, color=POINTS, marker=".", markersize=3, linestyle="none", label="seen")
    low, high = min(series.ratios), max(series.ratios)
    is_wide = high > DECADE * low > 0
    steps = np.unique(np.concatenate([series.steps, np.linspace(series.steps[0], series.steps[-1], 300)]))
    for fit, color, style, label in ((layer.early.fit, EARLY, "--", "fit on the first part"), (layer.fit, FITTED, "-", "fit on all")):
        told = fit.curve.at(steps) if fit else np.full(len(steps), np.nan)  # the legend is one for all panels
        axes.plot(steps, told, color=color, linestyle=style, linewidth=1.4, label=label)
    axes.axvline(until, color=CUT, linewidth=0.8, linestyle=":", label="end of the first part")
    if is_wide:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 2)
    else:
        axes.set_ylim(max(0.0, low - 0.25 * (high - low or 1)), high + 0.5 * (high - low or 1))  # an early curve may leave the panel
