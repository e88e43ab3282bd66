"""The page's look inside the model, from ``telemetry.jsonl``: a picture of layers and largest activations over the sampled steps, the last
sample layer by layer, and the matrices that moved or pulled most in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megastab.report.history import History, number
from megastab.report.inside_attention import attention_inside
from megastab.report.markup import figure, note, picture_tag, section, table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_LAYERS, SHOWN_MATRICES = 40, 8
# Key, name, and a span the colours hold at least, so that they mean the same in every run.
PANELS = (
    ("max", "largest magnitude", 1.0, 100.0),
    ("max_over_median", "largest over median", 10.0, 1000.0),
    ("kurtosis_first", "kurtosis of first tokens", 1.0, 100.0),
    ("kurtosis_rest", "kurtosis of the rest", 1.0, 100.0),
)
MEANING = (
    "The residual stream after each block, in the first micro-batch of each sampled step. A cross marks a massive activation: above 100 "
    "and at least 1000 times the median magnitude. A Gaussian has a kurtosis of 3. Colours are logarithmic; white is a value that was not "
    "finite."
)


def inside(history: History) -> str:
    """The section; empty where nothing was sampled."""
    return section("Inside the model", _picture(history), _layers(history), attention_inside(history), _matrices(history))


def figure_of_samples(history: History) -> Figure | None:
    """Layers over sampled steps, one panel a number; None where no activations were sampled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    samples = [sample for sample in history.samples if _residual(sample)]
    if not samples:
        return None
    layers = 1 + max(int(row["layer"]) for sample in samples for row in _residual(sample))
    picture = Figure(figsize=(10, 1.0 + 1.8 * len(PANELS)), dpi=120, layout="constrained")
    FigureCanvasAgg(picture)
    steps = [int(sample["step"]) for sample in samples]
    for axes, (key, name, low, high) in zip(picture.subplots(len(PANELS), 1, sharex=True), PANELS, strict=True):
        grid = [[math.nan] * len(samples) for _ in range(layers)]
        for column, sample in enumerate(samples):
            for row in _residual(sample):
                value = number(row.get(key))
                grid[int(row["layer"])][column] = value if value > 0 else math.nan
                if row.get("is_massive"):
                    axes.plot(column, int(row["layer"]), marker="X", color="#FFFFFF", markeredgecolor="#000000", markersize=6)
        seen = [value for row in grid for value in row if math.isfinite(value)]
        colours = LogNorm(min([low, *seen]), max([high, *seen]))
        drawn = axes.imshow(grid, aspect="auto", origin="lower", cmap="magma_r", norm=colours, interpolation="nearest")
        picture.colorbar(drawn, ax=axes, pad=0.01)
        axes.set_title(name, loc="left", fontsize=9)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    shown = range(0, len(steps), max(1, -(-len(steps) // 12)))
    axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    axes.set_xlabel("step")
    return picture


def _picture(history: History) -> str:
    picture = figure_of_samples(history)
    if picture is None:
        return ""
    return picture_tag(picture, "largest activations of each layer over the sampled steps") + note(MEANING)


def _layers(history: History) -> str:
    """The last sample's largest entry of each layer, and where it stands."""
    sampled = [sample for sample in history.samples if _residual(sample)]
    if not sampled:
        return ""
    rows = []
    residual = _residual(sampled[-1])
    for row in residual[:SHOWN_LAYERS]:
        top = row.get("top") or [{}]
        first = top[0] if isinstance(top[0], dict) else {}
        where = (
            f"sample {first.get('sample')}, position {first.get('position')}, token {first.get('token')}, channel {first.get('channel')}"
        )
        numbers = [figure(number(row.get(key))) for key in ("median", "max_over_median", "rms", "kurtosis_first", "kurtosis_rest")]
        largest = figure(number(first.get("value")), "not finite")
        massive = ' <span class="warn">massive</span>' if row.get("is_massive") else ""
        rows.append([text(row["layer"]), largest + massive, text(where), *numbers])
    head = ("layer", "largest", "where", "median", "over median", "RMS", "kurtosis, first", "rest")
    more = note(f"and {len(residual) - SHOWN_LAYERS} more layers: see telemetry.jsonl.") if len(residual) > SHOWN_LAYERS else ""
    return note(f"At step {sampled[-1]['step']}:") + table(head, rows, numbers=("layer", *head[3:])) + more


def _matrices(history: History) -> str:
    """The last sample's matrices with the largest share of the gradient."""
    sampled = [sample for sample in history.samples if _rows(sample, "weights")]
    if not sampled:
        return ""
    found = sorted(_rows(sampled[-1], "weights"), key=lambda row: -_or_zero(row.get("gradient_share")))
    keys = ("gradient_share", "gradient_norm", "update_ratio", "std", "std_over_target")
    rows = [[text(row.get("name", "?")), *(figure(number(row.get(key))) for key in keys)] for row in found[:SHOWN_MATRICES]]
    head = ("matrix", "share of squared norm", "gradient norm", "update over weight", "std", "over target")
    return note(f"The matrices with the largest share of the gradient at step {sampled[-1]['step']}:") + table(head, rows, numbers=head[1:])


def _residual(sample: dict[str, Any]) -> list[dict[str, Any]]:
    rows = _rows(sample, "activations")
    return [row for row in rows if row.get("site") == "residual" and isinstance(row.get("layer"), int) and row["layer"] >= 0]


def _rows(sample: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = sample.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _or_zero(value: Any) -> float:
    return 0.0 if math.isnan(number(value)) else number(value)
