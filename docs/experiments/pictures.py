"""The pictures of the experiments' pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megastab.report.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#4C78A8", "#E45756", "#54A24B", "#F58518", "#72569C", "#9D755D", "#7F7F7F", "#17BECF", "#E7298A", "#B79A20")


def new_figure(width: float, height: float, dpi: int = 110) -> Figure:
    """A figure without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_losses(valid: Mapping[str, Mapping[str, Sequence[float]]], out: Path) -> None:
    """{condition: {method: [loss of each seed]}}: a panel a condition, a dot a seed, a bar at the mean."""
    figure = new_figure(4.2 * len(valid), 3.4)
    for axes, (condition, by_method) in zip(figure.subplots(1, len(valid), squeeze=False)[0], valid.items(), strict=True):
        for place, values in enumerate(by_method.values()):
            finite = [x for x in values if math.isfinite(x)]
            axes.plot(finite, [place] * len(finite), "o", color=COLORS[0], markersize=5)
            if finite:
                axes.plot([sum(finite) / len(finite)], [place], "|", color=COLORS[1], markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(by_method)), list(by_method), fontsize=8)
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(condition, fontsize=10)
        axes.set_xlabel("validation loss [nats/token]", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    figure.savefig(out)


def draw_curves(histories: Mapping[str, Mapping[str, History]], out: Path) -> None:
    """{condition: {method: run}}: loss on the left, gradient norm on the right, a row a condition."""
    figure = new_figure(11, 2.6 * len(histories), dpi=80)
    for (left, right), (condition, by_method) in zip(figure.subplots(len(histories), 2, squeeze=False), histories.items(), strict=True):
        for color, (method, history) in zip(COLORS, by_method.items(), strict=False):
            steps = history.column("step")
            left.plot(steps, history.column("loss"), color=color, linewidth=0.8, alpha=0.8, label=method)
            right.plot(steps, history.column("grad_norm"), color=color, linewidth=0.8, alpha=0.8, label=method)
        right.set_yscale("log")
        left.set_ylabel(f"{condition}\nloss [nats/token]", fontsize=9)
        right.set_ylabel("gradient norm", fontsize=9)
        left.legend(fontsize=8, frameon=False)
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.set_xlabel("step", fontsize=8)
    figure.savefig(out)


def draw_layers(panels: Mapping[str, Mapping[str, Sequence[float]]], valid: Mapping[str, Sequence[float]], out: Path) -> None:
    """{quantity: {variant: value of each layer}} as a panel each, and a last one with the validation loss of every seed."""
    figure = new_figure(4.4 * (len(panels) + 1), 4.4)
    *layered, losses = figure.subplots(1, len(panels) + 1)
    for axes, (quantity, by_variant) in zip(layered, panels.items(), strict=True):
        for color, (variant, values) in zip(COLORS, by_variant.items(), strict=False):
            style = "o--" if "TVR" in variant else "o-"
            axes.plot(range(1, len(values) + 1), values, style, color=color, markersize=3, linewidth=1.2, label=variant)
        axes.set_title(quantity, fontsize=10)
        axes.set_xlabel("layer", fontsize=8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    handles, names = layered[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    for place, (color, values) in enumerate(zip(COLORS, valid.values(), strict=False)):
        losses.plot(values, [place] * len(values), "o", color=color)
    losses.set_yticks(range(len(valid)), list(valid), fontsize=8)
    losses.invert_yaxis()
    losses.grid(axis="x", alpha=0.3)
    losses.set_title("validation loss of each seed", fontsize=10)
    figure.savefig(out)


def draw_grid(
    panels: Mapping[str, Mapping[str, Sequence[float]]], dots: Mapping[str, Mapping[str, Sequence[float]]], dashed: str, out: Path
) -> None:
    """{quantity: {variant: value of each layer from 0}} above, {quantity: {variant: value of each seed}} below.

    Variants are called "colour; style": those of one colour share it, and those whose style is ``dashed`` have hollow marks.
    """
    figure = new_figure(4.6 * max(len(panels), len(dots)), 8.2, dpi=90)
    upper, lower = figure.subplots(2, max(len(panels), len(dots)), squeeze=False)
    kinds = list(dict.fromkeys(variant.partition("; ")[0] for variant in next(iter(panels.values()))))

    def style(variant: str) -> dict[str, str]:
        color = COLORS[kinds.index(variant.partition("; ")[0])]
        return {"color": color, "markerfacecolor": "white" if variant.endswith(dashed) else color}

    for axes, (quantity, by_variant) in zip(upper, panels.items(), strict=True):
        for variant, values in by_variant.items():
            line = "o--" if variant.endswith(dashed) else "o-"
            axes.plot(range(len(values)), values, line, markersize=4, linewidth=1.2, label=variant, **style(variant))
        axes.set_title(quantity, fontsize=10)
        axes.set_xlabel("block (0: embedding)", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, names = upper[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for axes, (quantity, by_variant) in zip(lower, dots.items(), strict=True):
        for place, (variant, values) in enumerate(by_variant.items()):
            axes.plot(values, [place] * len(values), "o", **style(variant))
        names = list(by_variant) if axes is lower[0] else [""] * len(by_variant)
        axes.set_yticks(range(len(by_variant)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=6)
        axes.set_title(f"{quantity}, each seed", fontsize=10)
    figure.savefig(out)
