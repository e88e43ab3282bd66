"""One sampled step as pictures: the layers from left to right with their largest activations and the median on a log axis; and the heads of
every layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megastab.telemetry.activations import SITES, Site
from megastab.telemetry.moments import MASSIVE
from megastab.telemetry.sampler import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAD_PANELS = (("first_key_mass", "mass on the first key", (0.0, 1.0), "magma_r"), ("entropy", "entropy, nats", (0.0, None), "viridis"))
RANKED = (("largest", "#B2182B"), ("second", "#F58518"), ("third", "#E6AB02"))
MEDIAN, BRANCHES = "#4C78A8", {"attention": "#54A24B", "mlp": "#72569C"}


def figure_of_sample(sample: Sample) -> Figure:
    """The residual stream's top three and median over the layers, and the largest entry of what each branch adds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (name, color) in enumerate(RANKED):
        _line(axes, sample, "residual", place, label=name, color=color, marker="o", markersize=4)
    _line(axes, sample, "residual", None, label="median", color=MEDIAN, marker="o", markersize=4)
    for site, color in BRANCHES.items():
        _line(axes, sample, site, 0, label=f"{site}'s largest", color=color, linestyle=":")  # type: ignore[arg-type]
    axes.axhline(MASSIVE, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("magnitude")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"residual stream after each block, step {sample.step}", loc="left", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def figure_of_heads(sample: Sample) -> Figure:
    """Layers times heads: the mass on the first key, and the entropy; white is a value that was not finite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, name, (low, high), colours) in zip(figure.subplots(1, len(HEAD_PANELS)), HEAD_PANELS, strict=True):
        grid = [[getattr(head, key) for head in heads] for heads in sample.attention.values()]
        drawn = axes.imshow(grid, aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, pad=0.02)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(f"attention of every head, step {sample.step}", fontsize=10)
    return figure


def image_of(figure: Figure) -> Any:
    """[height, width, 3] uint8, an array."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[attr-defined]


def _line(axes: Axes, sample: Sample, site: Site, rank: int | None, **style: Any) -> None:
    """The entry of ``rank`` (None: the median) over the layers; what is not finite or 0 has no place on a log axis."""
    assert site in SITES
    seen = {place.layer: found for place, found in sample.activations.items() if place.site == site}
    values = [found.median if rank is None else abs(found.top[min(rank, len(found.top) - 1)].value) for found in seen.values() if found.top]
    axes.plot(
        [layer for layer, found in seen.items() if found.top],
        [v if math.isfinite(v) and v > 0 else math.nan for v in values],
        linewidth=1.2,
        **style,
    )
