"""How the largest activations of a run moved, layer by layer: the five-parameter curve, and what its first part would have told."""

from __future__ import annotations

import argparse
import math
from typing import Any

from tqdm import tqdm

from megastab.analysis import arguments as shared
from megastab.analysis.dynamics_fit import Fit, FitFailed, fit
from megastab.analysis.dynamics_forecast import Forecast, forecast, seen_crossing
from megastab.analysis.dynamics_picture import Layer, draw
from megastab.analysis.dynamics_series import Measurement, Series, Source, of_checkpoints, of_run, places_of
from megastab.analysis.dynamics_table import append
from megastab.analysis.output import Table
from megastab.analysis.subject import Names, Subject
from megastab.analysis.windows import text_windows
from megastab.config.errors import UserError
from megastab.telemetry.moments import MASSIVE_RATIO

POOR = 0.5  # R2 below which a curve is called no description
FITTED = ("layer", "points", "R2", *("A", "lambda", "gamma", "t0", "K"), "peak at step", "+-", "peak ratio", "+-", "in the run", "remark")
WARNED = (
    "layer",
    "peak said",
    "fitted on all",
    "highest seen",
    "end said",
    "end seen",
    "error",
    "if it stayed",
    "1000 said at",
    "1000 seen at",
)
UNTOLD = "A peak outside the steps is extrapolated. Standard errors take the residuals as independent: they are lower bounds."


def examine(source: Source, start: int, first: float) -> list[Layer]:
    """Fit every layer, from step ``start`` on; and its part up to ``first`` of the steps planned."""
    bar = tqdm(source.series, desc="dynamics", unit="layer", leave=False, dynamic_ncols=True)
    return [_examined(series.between(start, math.inf), first * source.total_steps) for series in bar]


def _examined(series: Series, until: float) -> Layer:
    early = forecast(series, until)
    try:
        return Layer(series, fit(series.steps, series.ratios), "", early)
    except FitFailed as reason:
        return Layer(series, None, str(reason), early)


def remarks(layer: Layer, total_steps: int) -> str:
    """What a reader must know before believing the row."""
    found = layer.fit
    if found is None:
        return f"no fit: {layer.failure}"
    told = [f"{layer.series.left_out} samples without a ratio"] if layer.series.left_out else []
    if not found.curve.has_peak:
        told.append("A < 0: a lowest point, no peak")
    elif found.curve.peak_step <= found.first_step:
        told.append("falls from the start")
    elif found.curve.peak_step > total_steps:
        told.append("still rising at the end")
    if found.at_bound:
        told.append(f"{', '.join(found.at_bound)} at a bound: not determined")
    if found.r2 < POOR:
        told.append("R2 is low: the curve does not describe it (--from leaves out the first steps)")
    return "; ".join(told)


def tables(source: Source, layers: list[Layer], first: float) -> list[Table]:
    """The fits, and the early warning."""
    rows = [_fitted(layer, source.total_steps) for layer in layers]
    name = f"{source.name}: top-1 over median, A exp(-lambda x) log(x) + K with x = gamma t + t0"
    title = f"{source.name}: what steps up to {layers[0].early.until:g} ({first:.0%}) say of the rest"
    return [Table(name, FITTED, rows), Table(title, WARNED, [_warned(layer) for layer in layers])]


def _fitted(layer: Layer, total_steps: int) -> list[Any]:
    found, remark = layer.fit, remarks(layer, total_steps)
    if found is None:
        return [layer.series.layer, len(layer.series.steps), *[None] * (len(FITTED) - 3), remark]
    curve = found.curve
    peak = [curve.peak_step, found.peak_step_error, curve.peak_height, found.peak_height_error] if curve.has_peak else [None] * 4
    in_run = curve.is_observable(found.last_step) and curve.peak_step >= found.first_step
    return [layer.series.layer, found.num_points, found.r2, *curve, *peak, in_run, remark]


def _warned(layer: Layer) -> list[Any]:
    early, outcome = layer.early, layer.early.outcome
    if early.fit is None:
        return [layer.series.layer, f"no fit: {early.failure}", *[None] * (len(WARNED) - 2)]
    seen = [f"{outcome.highest:.4g} at {outcome.highest_step}", outcome.told_end, outcome.end] if outcome else [None] * 3
    errors = [f"{outcome.error:.0%}", f"{outcome.error_of_staying:.0%}"] if outcome else [None] * 2
    crossing = "never" if early.crossing is None else f"{early.crossing:.0f}"
    was = seen_crossing(layer.series)
    return [layer.series.layer, _peak(early.fit), _peak(layer.fit), *seen, *errors, crossing, "not yet" if was is None else was]


def _peak(found: Fit | None) -> str:
    if found is None:
        return "no fit"
    if not found.curve.has_peak:
        return f"none; ends at {found.curve.asymptote:.4g}"
    return f"{found.curve.peak_height:.4g} at {found.curve.peak_step:.0f}"


def verdict(forecasts: list[Forecast]) -> str:
    """How far the early warning is to be believed, from this run alone."""
    outcomes = [each.outcome for each in forecasts if each.outcome]
    if not outcomes:
        return "The run has not gone beyond its first part, or that could not be fitted: nothing to compare with."
    better = sum(each.error < each.error_of_staying for each in outcomes)
    worst = max(each.error for each in outcomes)
    text = f"The early curve came nearer than 'it stays as it is' in {better} of {len(outcomes)} layers (median errors up to {worst:.0%})."
    return text if 2 * better > len(outcomes) else text + " Do not rely on it here."


def to_json(source: Source, layers: list[Layer], first: float) -> dict[str, Any]:
    """Everything, by layer."""
    shape = source.architecture._asdict() if source.architecture else None
    about = {"run": source.name, "architecture": shape, "total_steps": source.total_steps, "first": first}
    return {**about, "verdict": verdict([layer.early for layer in layers]), "layers": [_layer_json(x, source.total_steps) for x in layers]}


def _layer_json(layer: Layer, total_steps: int) -> dict[str, Any]:
    series, found = layer.series, layer.fit
    facts = {"fit": found.to_json() if found else None, "remark": remarks(layer, total_steps)}
    crossing = {"said_at": found.curve.first_crossing(MASSIVE_RATIO, found.first_step) if found else None, "seen_at": seen_crossing(series)}
    seen = {"steps": series.steps, "ratios": series.ratios, "left_out": series.left_out}
    return {"layer": series.layer, **facts, "crosses_1000": crossing, "early_warning": layer.early.to_json(), **seen}


# -- the command -------------------------------------------------------------------------------------------------------


def source_of(arguments: argparse.Namespace) -> Source:
    """A run's telemetry, or checkpoints measured."""
    if bool(arguments.run_folder) == bool(arguments.checkpoints):
        raise UserError("give a run folder (its telemetry is read), or --checkpoints STEP=FOLDER ... with --text (they are measured)")
    if arguments.run_folder:
        return of_run(arguments.run_folder)
    if not arguments.text:
        raise UserError("--checkpoints are measured on text: give --text SOURCE")

    def windows(subject: Subject) -> Any:
        return text_windows(subject, arguments.text, arguments.windows, arguments.seq_len or min(subject.max_seq_len, 4096))

    dtype = shared.DTYPES[arguments.dtype] if arguments.dtype else None
    places = places_of(arguments.checkpoints)
    return of_checkpoints(places, Measurement(windows, arguments.batch, dtype, Names(arguments.blocks, None, None)))


def _run(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.first <= 1:
        raise UserError(f"--first {arguments.first:g} is a share of the run: give one above 0 and at most 1, e.g. 0.2")
    source, output = source_of(arguments), shared.output_of(arguments)
    layers = examine(source, arguments.start, arguments.first)
    data = to_json(source, layers, arguments.first)
    output.write("dynamics", data, tables(source, layers, arguments.first))
    print(f"{UNTOLD}\n{data['verdict']}")
    if output.folder is not None:
        output.picture("dynamics", draw(source.name, layers))
    if arguments.table:
        _add_to_table(arguments, source, layers)


def _add_to_table(arguments: argparse.Namespace, source: Source, layers: list[Layer]) -> None:
    if source.architecture is None:
        raise UserError(
            f"--table {arguments.table}: the architecture of {source.name} is not known (no readable config.json, or no MLP found)"
        )
    fits = {layer.series.layer: layer.fit.to_json() for layer in layers if layer.fit is not None}
    count = append(arguments.table, arguments.run_id or source.name, source.architecture, fits)
    print(f"{arguments.table}: {count} layers added, {len(layers) - count} without a fit")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="run folder with telemetry.jsonl (megastab.telemetry.interval_steps)")
    parser.add_argument(
        "--checkpoints", nargs="+", metavar="STEP=FOLDER", help="measure these instead; a run folder stands for all it holds"
    )
    parser.add_argument("--from", dest="start", type=int, default=0, metavar="STEP", help="leave out earlier steps, e.g. the warm-up")
    parser.add_argument("--first", type=float, default=0.2, metavar="SHARE", help="part of the planned steps the early warning sees (0.2)")
    parser.add_argument("--table", metavar="FILE", help="add the fitted layers to this .csv or .jsonl, for predict")
    parser.add_argument("--run-id", metavar="NAME", help="what the table calls this run (default: its folder's name)")
    parser.add_argument("--text", metavar="SOURCE", help="for --checkpoints: text file, folder, .jsonl with text, or .bin/.idx prefix")
    parser.add_argument("--windows", type=int, default=10, metavar="N", help="windows of text (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, metavar="S", help="tokens of a window (default: as the model was built for, at most 4096)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="windows of one forward pass (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(shared.DTYPES), help="of the weights (default: fp32 on a CPU, what was saved elsewhere)")
    parser.add_argument("--blocks", metavar="NAME", help="where a foreign model keeps its blocks, e.g. transformer.h")
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("dynamics", "top-1 over median during training: curve, peak, early warning", _add_arguments, _run)
