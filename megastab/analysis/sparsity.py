"""How sparse a trained model's MLPs are: CETT curves and PPL-p% sparsity (arXiv 2411.02335), and the share of activations that are not 0
(arXiv 2210.06313, for ReLU and its like).

Every layer gets the threshold at which it reaches one common CETT; a common threshold would treat layers of different scale unequally.
Thresholds come from calibration tokens, perplexity and sparsity from other windows. PPL-p% is the largest CETT at which perplexity is at
most 1 + p/100 times that of the whole model, found by bisection: it takes perplexity to grow with CETT, and ends at the first crossing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from megastab.analysis import arguments as shared
from megastab.analysis import probe_arguments as probes
from megastab.analysis.cett import TailCurve, largest_within, tail_curve
from megastab.analysis.output import Table, new_figure, shown
from megastab.analysis.perplexity import perplexity
from megastab.analysis.pruned import Counts, activations, down_DF, down_projections, pruned
from megastab.analysis.quantize import finite_perplexity
from megastab.analysis.subject import Subject
from megastab.config.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Point(NamedTuple):
    """The model with every layer at one CETT."""

    cett: float
    perplexity: float
    thresholds: list[float]
    counts: list[Counts]
    """By layer."""

    @property
    def sparsity(self) -> float:
        """Share of neurons left out, over tokens and layers."""
        return sum(c.left_out for c in self.counts) / sum(c.neurons for c in self.counts)

    def sparsities(self) -> list[float]:
        """By layer."""
        return [c.left_out / c.neurons for c in self.counts]


class Probe:
    """One model on one text; every CETT is tried once."""

    def __init__(self, subject: Subject, windows: probes.Windows, batch: int = 1, num_tokens: int = 1024):
        self.subject, self.windows, self.batch = subject, windows, batch
        self.downs = down_projections(subject)
        self.plain = finite_perplexity(subject, windows, batch)
        self.num_tokens = num_tokens
        self.points: dict[float, Point] = {}

    @cached_property
    def curves(self) -> list[TailCurve]:
        """Of every layer, on the calibration tokens."""
        seen = activations(self.subject, self.downs, self.windows.calibration_CS, self.batch, self.num_tokens)
        curves = []
        with tqdm(total=sum(map(len, seen)), desc="thresholds", unit="token", leave=False, dynamic_ncols=True) as bar:
            for layer, linear in enumerate(self.downs):
                weight_DF = down_DF(linear)
                curves.append(tail_curve(seen[layer].to(weight_DF.device), weight_DF, bar.update).thinned())
                seen[layer] = torch.empty(0)
        return curves

    def at(self, cett: float) -> Point:
        """The model at one CETT."""
        if cett not in self.points:
            thresholds = [curve.at(cett)[0] for curve in self.curves]
            with pruned(self.downs, thresholds) as counts:
                found = perplexity(self.subject, self.windows.evaluated_NS, self.batch, f"CETT {cett:.4g}")
            self.points[cett] = Point(cett, found, thresholds, counts())
        return self.points[cett]

    def nonzero(self) -> list[float]:
        """Share of activations that are not exactly 0, by layer."""
        return [c.nonzero / c.neurons for c in self.at(0.0).counts]  # where nothing but zeros is left out

    def within(self, percent: float, tolerance: float, tried: Sequence[float] = TARGETS) -> Point:
        """PPL-p%: the point of the largest CETT, to ``tolerance``, at most ``percent`` above the whole model's perplexity."""
        bound = self.plain * (1 + percent / 100)
        return self.at(largest_within(lambda cett: self.at(cett).perplexity <= bound, [c for c in tried if 0 < c < 1], tolerance))


def tables_of(probe: Probe, best: Point, percent: float) -> list[Table]:
    """The curve, and the layers at the point found."""
    name = probe.subject.name
    columns = ["CETT", "sparsity", "active", "perplexity", "penalty"]
    points = sorted(probe.points.values())
    rows: list[list[object]] = [
        [p.cett, p.sparsity, 1 - p.sparsity, p.perplexity, p.perplexity - probe.plain] for p in points if p.cett in TARGETS
    ]
    rows.append([f"{best.cett:.4g} (PPL-{percent:g}%)", best.sparsity, 1 - best.sparsity, best.perplexity, best.perplexity - probe.plain])
    layers = zip(best.thresholds, best.sparsities(), probe.nonzero(), strict=True)
    return [
        Table(f"{name}: perplexity {shown(probe.plain)}", columns, rows),
        Table(
            f"{name}: layers at PPL-{percent:g}%",
            ["layer", "threshold", "sparsity", "not zero"],
            [[i, *layer] for i, layer in enumerate(layers)],
        ),
    ]


def data_of(probe: Probe, best: Point, percent: float) -> dict[str, Any]:
    """For JSON."""
    points = [
        {"cett": p.cett, "perplexity": p.perplexity, "sparsity": p.sparsity, "layers": p.sparsities(), "thresholds": p.thresholds}
        for p in sorted(probe.points.values())
    ]
    found = {"percent": percent, "cett": best.cett, "sparsity": best.sparsity, "perplexity": best.perplexity}
    return {"perplexity": probe.plain, "points": points, "ppl_percent": found, "nonzero": probe.nonzero()}


def figure_of(probe: Probe, best: Point, percent: float) -> Figure:
    """Sparsity and perplexity over CETT, and the layers at the point found."""
    figure = new_figure(12, 3.8)
    figure.suptitle(probe.subject.name, fontsize=10)
    sparsity, cost, layers = figure.subplots(1, 3)
    points = sorted(probe.points.values())
    x, shares = [p.cett for p in points], [p.sparsity for p in points]
    found = f"PPL-{percent:g}%"
    _curve(sparsity, x, shares, (best.cett, best.sparsity), found)
    sparsity.set(xlabel="CETT", ylabel="neurons left out")
    _curve(cost, shares, [p.perplexity / probe.plain for p in points], (best.sparsity, best.perplexity / probe.plain), found)
    cost.set(xlabel="neurons left out", ylabel="perplexity, times the whole model's")
    if points[-1].perplexity > 10 * probe.plain:
        cost.set_yscale("log")
    cost.axhline(1 + percent / 100, color="#7F7F7F", linewidth=0.8, linestyle="--")
    numbers = range(len(best.counts))
    layers.plot(numbers, best.sparsities(), color="#4C78A8", marker="o", markersize=4, label=f"left out at {found}")
    layers.plot(numbers, probe.nonzero(), color="#54A24B", marker="s", markersize=4, label="not zero")
    layers.set_xlabel("layer")
    layers.set_ylim(-0.03, 1.03)
    layers.xaxis.get_major_locator().set_params(integer=True)
    layers.legend(fontsize=8)
    return figure


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], mark: tuple[float, float], mark_name: str) -> None:
    axes.plot(x, y, color="#4C78A8", marker="o", markersize=3)
    axes.plot(*mark, color="#E45756", marker="D", markersize=7, linestyle="none", label=mark_name)
    axes.legend(fontsize=8)


def _run(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.tolerance < 1 or arguments.percent < 0 or arguments.tokens < 1:
        raise UserError(
            f"--tolerance {arguments.tolerance} must lie between 0 and 1, --percent {arguments.percent} not be negative, "
            f"--tokens {arguments.tokens} be at least 1"
        )
    subject = shared.subject_of(arguments)
    windows = probes.evaluated_and_calibration(arguments, subject)
    probe = Probe(subject, windows, arguments.batch, arguments.tokens)
    for cett in TARGETS:
        probe.at(cett)
    best = probe.within(arguments.percent, arguments.tolerance)
    output = shared.output_of(arguments)
    made = probes.how_evaluated(arguments, subject, windows) | {"calibration_tokens": arguments.tokens, "tolerance": arguments.tolerance}
    output.write("sparsity", made | data_of(probe, best, arguments.percent), tables_of(probe, best, arguments.percent))
    output.picture("sparsity", figure_of(probe, best, arguments.percent))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    probes.add_common_arguments(parser, "thresholds are found")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="calibration tokens, spread over its windows (default: %(default)s)"
    )
    parser.add_argument(
        "--percent", type=float, default=1.0, metavar="P", help="rise of perplexity allowed by PPL-p%% (default: %(default)s)"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the CETT found by bisection (default: %(default)s)")


ANALYSIS = shared.Analysis("sparsity", "how many neurons of the MLPs matter: CETT, PPL-p%, share not zero", _add_arguments, _run)
