"""The three curves of a run over its steps: loss, gradient norm, learning rate, as one PNG, with what went wrong marked on them.

Draws what ``metrics.jsonl`` holds and smooths nothing away: where a long run's loss is noisy a running median is laid over it.
A value that was not finite is a triangle at the top of its panel. Where ZClip ran, the norm lies on its mean and deviation.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from megastab.report.history import History, read_history
from megastab.report.incidents import Incident, incidents_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALID, NORM, CLIP, SKIP, CAP, RATE = "#4C78A8", "#E45756", "#54A24B", "#F58518", "#B2182B", "#7F7F7F", "#72569C"
LOSS_SPIKE, RESCALE, BAND = "#E7298A", "#9D755D", "#B79A20"
NO_LINES = ("save", "skip", "clip", "norm_spike", "loss_spike", "replay", "rescale")  # a save is no news; the others have their own marks
EVENT = {"resume": "#7F7F7F", "rewind": "#B2182B", "warning": "#E6AB02"}
SMOOTHED_FROM_STEPS = 200  # below, the line itself is readable
WINDOW_SHARE = 50  # the running median spans 1/50 of the run
NUMBERED = 5  # the worst steps carry their number
NUMBERS_APART = 0.05  # of the run, or they would cover one another
LEGEND_COLUMNS = 6


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
    figure.suptitle(history.summary(), x=0.01, ha="left", fontsize=10, parse_math=False)
    incidents = incidents_of(history)
    _draw_loss(loss, history, incidents)
    _draw_norm(norm, history)
    _draw_rate(rate, history)
    _number_the_worst(norm, history, incidents)
    figure.align_ylabels()
    return figure


def _draw_loss(axes: Axes, history: History, incidents: list[Incident]) -> None:
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
    where = dict(zip(steps, values, strict=True))
    for kind, name, marker, color in (("skip", "skipped", "x", SKIP), ("loss_spike", "loss spike", "D", LOSS_SPIKE)):
        marked = [i.step for i in incidents if kind in i.kinds and math.isfinite(where.get(i.step, math.nan))]
        if marked:
            axes.plot(marked, [where[s] for s in marked], color=color, marker=marker, markersize=6, linestyle="none", label=name, zorder=5)
    _draw_events(axes, history)
    _finish(axes, "loss [nats/token]", steps, values)


def _draw_events(axes: Axes, history: History) -> None:
    """Lines where the run was turned or warned of; ticks at the bottom where matrices were rescaled."""
    at_height = axes.get_xaxis_transform()
    for kind in dict.fromkeys(kind for event in history.events if isinstance(kind := event.get("kind"), str)):
        if kind not in NO_LINES:
            at = sorted({event["step"] for event in history.events_of(kind)})
            axes.vlines(at, 0, 1, transform=at_height, color=EVENT.get(kind, CAP), linewidth=1.0, linestyle=":", label=kind)
    rescales = history.events_of("rescale")
    if rescales:
        at = sorted({event["step"] for event in rescales})
        axes.vlines(at, 0, 0.04, transform=at_height, color=RESCALE, linewidth=1.5, label=f"rescale ({len(rescales)})")


def _draw_norm(axes: Axes, history: History) -> None:
    steps, values = history.column("step"), history.column("grad_norm")
    is_adaptive = _draw_band(axes, history, steps, values)
    axes.plot(steps, values, color=NORM, linewidth=1.0, label="before clipping")
    where = dict(zip(steps, values, strict=True))
    clipped, skipped = history.steps_where("clip"), [step for step in history.steps_where("skip") if math.isfinite(where[step])]
    thresholds = history.column("clip_threshold")
    if any(map(math.isfinite, thresholds)):
        name = "threshold" if is_adaptive else "cap"
        axes.plot(steps, thresholds, color=CAP, linewidth=1.0, linestyle=":", drawstyle="steps-mid", label=name)
    if clipped:
        share = f"clipped ({len(clipped)} of {len(steps)} steps)"
        axes.plot(clipped, [where[s] for s in clipped], color=CLIP, marker=".", markersize=4, linestyle="none", label=share)
    if skipped:
        axes.plot(skipped, [where[s] for s in skipped], color=SKIP, marker="x", markersize=7, linestyle="none", label="skipped", zorder=5)
    if spans_decade(values):
        axes.set_yscale("log")
    _finish(axes, "gradient norm", steps, values, " (skipped)" if history.steps_where("skip") else "")


def _draw_band(axes: Axes, history: History, steps: list[float], values: list[float]) -> bool:
    """ZClip's mean and the deviation around it, where it kept them; whether an adaptive rule judged the norm at all."""
    mean, std = history.column("clip_mean"), history.column("clip_std")
    if any(map(math.isfinite, mean)):
        floor = min((value for value in values if math.isfinite(value) and value > 0), default=0.0)  # a logarithm needs one
        low = [max(m - s, floor) if m > floor else m for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(steps, low, high, color=BAND, alpha=0.25, linewidth=0, label="ZClip's mean +- std")
        axes.plot(steps, mean, color=BAND, linewidth=1.0)
    return any(map(math.isfinite, mean)) or any(map(math.isfinite, history.column("z")))


def _draw_rate(axes: Axes, history: History) -> None:
    steps, values = history.column("step"), history.column("lr")
    axes.plot(steps, values, color=RATE, linewidth=1.4)
    axes.set_ylim(0, 1.1 * max((v for v in values if math.isfinite(v)), default=1.0) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("step")
    _finish(axes, "learning rate", steps, values)


def _number_the_worst(axes: Axes, history: History, incidents: list[Incident]) -> None:
    """The step of the worst incidents beside their marks, so that the table of the page can be found in the picture."""
    steps = history.column("step")
    span, taken = max(steps) - min(steps), list[int]()
    for incident in incidents:
        if len(taken) == NUMBERED or incident.is_overflow:
            break
        is_crowded = any(abs(incident.step - other) < NUMBERS_APART * span for other in taken)
        if is_crowded or not min(steps) <= incident.step <= max(steps):
            continue
        taken.append(incident.step)
        is_right = incident.step - min(steps) > 0.9 * span  # the text would leave the panel
        is_drawn = math.isfinite(incident.norm)  # else its triangle is at the top
        axes.annotate(
            f"{incident.step}",
            (incident.step, incident.norm if is_drawn else 0.97),
            xycoords="data" if is_drawn else axes.get_xaxis_transform(),
            xytext=(-6 if is_right else 6, -3),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            fontsize=7,
            color=SKIP,
        )


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
        columns = min(entries, LEGEND_COLUMNS)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, fontsize=8, frameon=False, borderaxespad=0.1)


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
