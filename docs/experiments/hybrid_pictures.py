"""The picture of the hybrids' page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pictures import COLORS, new_figure

Lines = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def draw_blocks(by_block: Lines, by_seed: Mapping[str, Mapping[str, Sequence[float]]], marks: Mapping[str, float], out: Path) -> None:
    """Panels, four a row.

    Args:
        by_block: {quantity: {cell: of each seed [of each block]}}: the mean of the seeds as a line, each seed as a dot.
        by_seed: {quantity: {cell: of each seed}}.
        marks: {quantity: where its panel has a dotted line}; those above 1 are drawn on a logarithmic axis.
        out: a PNG.
    """
    rows = -(-(len(by_block) + len(by_seed)) // 4)
    figure = new_figure(4.3 * 4, 4.2 * rows, dpi=90)
    panels = figure.subplots(rows, 4, squeeze=False).flat
    for quantity, by_cell in by_block.items():
        axes = next(panels)
        for cell, seeds in by_cell.items():
            places = range(1, len(seeds[0]) + 1)
            mean = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
            axes.plot(places, mean, "--" if "tvr" in cell else "-", label=cell, **look_of(cell))
            for values in seeds:
                axes.plot(places, values, "o", markersize=4, **look_of(cell))
        axes.set_title(quantity, fontsize=10)
        axes.set_xlabel("block", fontsize=8)
        axes.grid(alpha=0.3, which="both")
        if marks.get(quantity, 0.0) > 1:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if quantity in marks:
            axes.axhline(marks[quantity], color="black", linewidth=0.8, linestyle=":")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    for number, (quantity, by_cell) in enumerate(by_seed.items()):
        axes = next(panels)
        for place, (cell, values) in enumerate(by_cell.items()):
            axes.plot(values, [place] * len(values), "o", **look_of(cell))
        names = [cell.replace(", embedding", ",\nembedding") if number == 0 else "" for cell in by_cell]
        axes.set_yticks(range(len(by_cell)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(quantity, fontsize=10)
        axes.set_xlabel("each seed", fontsize=8)
    figure.savefig(out)


def look_of(cell: str) -> dict[str, str]:
    """A colour for what is changed in the model; with TVR the marks are hollow."""
    kinds = ("baseline", "kv_bias", "dyt", "baseline, init .08", "dyt, init .08", "baseline, init .08, embedding x 11.3")
    color = COLORS[kinds.index("baseline" if cell == "tvr" else cell.removesuffix(" + tvr"))]
    return {"color": color, "markerfacecolor": "white" if "tvr" in cell else color}
