"""Attention in the page's look inside the model: layers over the sampled steps, and the last sample's heads and layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megastab.report.history import History, number
from megastab.report.markup import figure, note, picture_tag, table, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = dict[int, dict[str, list[float]]]  # by layer, its heads' numbers by key
SHOWN_LAYERS = 40
COLUMNS = ("largest_logit", "entropy", "first_key_mass", "first_key_share", "sink_mass")
MEANING = (
    "Attention in the first sample of each sampled step, at 64 queries spread over it. The first key is the first one a query sees: of the "
    "sample, or of its document where documents are masked. Equal logits would put there what the table calls <i>if uniform</i>; far more "
    "than that is an attention sink. White is a value that was not finite."
)


def attention_inside(history: History) -> str:
    """Picture and table; empty where no attention was sampled."""
    sampled = [(int(sample["step"]), found) for sample in history.samples if (found := rows_of(sample))]
    if not sampled:
        return ""
    step, last = sampled[-1]
    return picture_tag(figure_of_attention(sampled), "attention of layers and heads") + note(MEANING) + _table(step, last)


def rows_of(sample: dict[str, Any]) -> Rows:
    """The layers a line of ``telemetry.jsonl`` tells of; what is spoilt is left out."""
    rows = sample.get("attention")
    found: Rows = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("layer"), int) and row["layer"] >= 0:
            held = {key: [number(value) for value in row[key]] for key in COLUMNS if isinstance(row.get(key), list)}
            found[row["layer"]] = held | {"first_key_uniform": [number(row.get("first_key_uniform"))]}
    return found


def figure_of_attention(sampled: list[tuple[int, Rows]]) -> Figure:
    """Layers over the sampled steps: mean mass on the first key, and largest logit; and the mass of every head in the last sample."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state of pyplot's
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 7.0), dpi=120, layout="constrained")
    FigureCanvasAgg(picture)
    steps, (step, last) = [step for step, _ in sampled], sampled[-1]
    layers = 1 + max(layer for _, rows in sampled for layer in rows)
    mass, logit, heads = picture.subplots(3, 1)
    means = [[_mean(rows.get(layer, {}).get("first_key_mass", [])) for _, rows in sampled] for layer in range(layers)]
    largest = [[_extreme(rows.get(layer, {}).get("largest_logit", []), max) for _, rows in sampled] for layer in range(layers)]
    _map(picture, mass, means, "mass on the first key, mean over heads", "step", (0.0, 1.0))
    _map(picture, logit, largest, "largest logit of any head", "step", (0.0, None))
    for axes in (mass, logit):
        shown = range(0, len(steps), max(1, -(-len(steps) // 12)))
        axes.set_xticks(list(shown), [str(steps[i]) for i in shown])
    columns = max(len(of.get("first_key_mass", [])) for of in last.values())
    grid = [(of := last.get(layer, {}).get("first_key_mass", [])) + [math.nan] * (max(columns, 1) - len(of)) for layer in range(layers)]
    _map(picture, heads, grid, f"mass on the first key of every head, step {step}", "head", (0.0, 1.0))
    return picture


def _map(picture: Figure, axes: Axes, grid: list[list[float]], name: str, along: str, span: tuple[float | None, float | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = axes.imshow(grid, aspect="auto", origin="lower", cmap="magma_r", vmin=span[0], vmax=span[1], interpolation="nearest")
    picture.colorbar(drawn, ax=axes, pad=0.01)
    axes.set_title(name, loc="left", fontsize=9)
    axes.set_xlabel(along)
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _table(step: int, rows: Rows) -> str:
    """The last sample, layer by layer."""
    cells = []
    for layer in sorted(rows)[:SHOWN_LAYERS]:
        of = {key: rows[layer].get(key, []) for key in COLUMNS}
        numbers = [
            _extreme(of["largest_logit"], max), _mean(of["entropy"]), _extreme(of["entropy"], min), _mean(of["first_key_mass"]),
            _extreme(of["first_key_mass"], max), rows[layer]["first_key_uniform"][0], _mean(of["first_key_share"]), _mean(of["sink_mass"]),
        ]  # fmt: skip
        cells.append([text(layer), *map(figure, numbers)])
    head = ("layer", "largest logit", "entropy, mean", "lowest", "first key, mean", "highest", "if uniform", "share of queries", "sink")
    more = note(f"and {len(rows) - SHOWN_LAYERS} more layers: see telemetry.jsonl.") if len(rows) > SHOWN_LAYERS else ""
    return note(f"Attention at step {step}; mean, lowest and highest are over the heads:") + table(head, cells, numbers=head) + more


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _extreme(values: list[float], choose: Any) -> float:
    return math.nan if not values or any(map(math.isnan, values)) else float(choose(values))
