"""The three curves of a run over its steps: loss, gradient norm, learning rate, as one PNG.

Draws what ``metrics.jsonl`` holds and smooths nothing away: where a long run's loss is noisy a running median is laid over it.
A value that was not finite is a triangle at the top of its panel.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from megastab.report.history import History, read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALID, NORM, CLIP, SKIP, CAP, RATE = "#4C78A8", "#E45756", "#54A24B", "#F58518", "#B2182B", "#7F7F7F", "#72569C"
ORDINARY = ("save", "skip")  # a save is no news, and a skip is marked on the norm
EVENT = {"resume": "#7F7F7F", "rewind": "#B2182B", "rescale": "#9D755D", "spike": "#F58518"}
SMOOTHED_FROM_STEPS = 200  # below, the line itself is readable
WINDOW_SHARE = 50  # the running median spans 1/50 of the run


def draw_curves(run_folder: str | Path, out_png: str | Path | None = None) -> Path:
    """Draw a run's curves; returns the picture's path, ``curves.png`` in the run folder unless told otherwise.

    Raises:
        UserError: the folder holds no steps.
    """
    figure = figure_of(read_history(run_folder))
    out = Path(run_folder) / "curves.png" if out_png is None else Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def figure_of(history: History) -> Figure:
    """The picture, not yet a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2.4, 1.2))
    figure.suptitle(history.summary(), x=0.01, ha="left", fontsize=10)
    _draw_loss(loss, history)
    _draw_norm(norm, history)
    _draw_rate(rate, history)
    figure.align_ylabels()
    return figure


def _draw_loss(axes: Axes, history: History) -> None:
    steps, values = history.column("step"), history.column("loss")
    is_long = len(steps) >= SMOOTHED_FROM_STEPS
    if is_long:
        half = max(2, len(steps) // WINDOW_SHARE // 2)
        axes.plot(steps, values, color=TRAIN, alpha=0.35, linewidth=0.8)
        axes.plot(*running_median(steps, values, half), color=TRAIN, linewidth=1.6, label=f"train, median of {2 * half + 1} steps")
    else:
        axes.plot(steps, values, color=TRAIN, linewidth=1.4, label="train")
    at, valid = history.evaluated("valid_loss")
    if at:
        axes.plot(at, valid, color=VALID, marker="o", markersize=5, linewidth=1.0, linestyle="--", label="validation", zorder=4)
    for kind in dict.fromkeys(event["kind"] for event in history.events if event.get("kind") not in ORDINARY):
        at = [event["step"] for event in history.events if event.get("kind") == kind]
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), color=EVENT.get(kind, CAP), linewidth=1.0, linestyle=":", label=kind)
    _finish(axes, "loss [nats/token]", steps, values)


def _draw_norm(axes: Axes, history: History) -> None:
    steps, values = history.column("step"), history.column("grad_norm")
    axes.plot(steps, values, color=NORM, linewidth=1.0, label="before clipping")
    where = dict(zip(steps, values, strict=True))
    clipped, skipped = history.steps_where("clip"), [step for step in history.steps_where("skip") if math.isfinite(where[step])]
    thresholds = history.column("clip_threshold")
    if any(map(math.isfinite, thresholds)):
        axes.plot(steps, thresholds, color=CAP, linewidth=1.0, linestyle=":", drawstyle="steps-mid", label="cap")
    if clipped:
        share = f"clipped ({len(clipped)} of {len(steps)} steps)"
        axes.plot(clipped, [where[s] for s in clipped], color=CLIP, marker=".", markersize=4, linestyle="none", label=share)
    if skipped:
        axes.plot(skipped, [where[s] for s in skipped], color=SKIP, marker="x", markersize=7, linestyle="none", label="skipped", zorder=5)
    if spans_decade(values):
        axes.set_yscale("log")
    _finish(axes, "gradient norm", steps, values, " (skipped)" if history.steps_where("skip") else "")


def _draw_rate(axes: Axes, history: History) -> None:
    steps, values = history.column("step"), history.column("lr")
    axes.plot(steps, values, color=RATE, linewidth=1.4)
    axes.set_ylim(0, 1.1 * max((v for v in values if math.isfinite(v)), default=1.0) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("step")
    _finish(axes, "learning rate", steps, values)


def _finish(axes: Axes, name: str, steps: list[float], values: list[float], also: str = "") -> None:
    """What every panel has: name, grid, and triangles at the top where a value was not finite."""
    missing = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if missing:
        at_top = axes.get_xaxis_transform()
        label = f"not finite{also}: {len(missing)} {'step' if len(missing) == 1 else 'steps'}"
        height = [0.97] * len(missing)
        axes.plot(missing, height, color=SKIP, marker="v", markersize=7, linestyle="none", transform=at_top, clip_on=False, label=label)
    axes.set_ylabel(name)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(x=0.01)
    entries = len(axes.get_legend_handles_labels()[0])
    if entries:  # above the panel, where it covers no spike
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=entries, fontsize=8, frameon=False, borderaxespad=0.1)


def spans_decade(values: list[float]) -> bool:
    """Whether the positive finite values lie more than a factor of 10 apart."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return bool(positive) and max(positive) > 10 * min(positive)


def running_median(steps: list[float], values: list[float], half: int) -> tuple[list[float], list[float]]:
    """(steps, medians of the finite values within ``half`` places on either side), at no more places than a picture shows."""
    places = range(0, len(values), max(1, half // 4))
    medians = []
    for i in (*places, len(values) - 1):
        near = [value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)]
        medians.append(median(near) if near else math.nan)
    return [steps[i] for i in (*places, len(values) - 1)], medians
