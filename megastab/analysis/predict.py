"""What an architecture's largest activations will do, learned from a table of fitted runs; and how little that may be worth."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megastab.analysis import arguments as shared
from megastab.analysis.dynamics_regression import MODELS, TARGETS, WITHIN, Learned, check_runs, learn, predict
from megastab.analysis.dynamics_series import Architecture, architecture_of
from megastab.analysis.dynamics_table import Row, read
from megastab.analysis.output import Table
from megastab.config.errors import UserError
from megastab.config.source import read_source

LEAKY = (
    "'by layer' leaves out single layers whose neighbours of the same run are in the training set: the model recognises the run and "
    "repeats it. It stands here for comparison with figures obtained that way and is not to be trusted: for a new run only 'by run' counts."
)


def score_table(name: str, found: list[Learned]) -> Table:
    """R2 of every model on every target, by run and by layer."""
    columns = ["parameter", "layers", "runs", *(f"{model}, by {way}" for model in MODELS[1:] for way in ("run", "layer")), "best by run"]
    rows: list[list[Any]] = []
    for each in found:
        if each.failure:
            rows.append([each.target, each.num_rows, each.num_runs, *[None] * (len(columns) - 4), each.failure])
            continue
        scores = [value for model in MODELS[1:] for value in (each.scores[model].by_run, each.scores[model].by_layer)]
        rows.append([each.target, each.num_rows, each.num_runs, *scores, "none beats the mean" if each.best == "mean" else each.best])
    return Table(f"{name}: R2 left out by run, and by layer (leaky)", columns, rows)


def prediction_table(name: str, told: dict[str, list[tuple[float, float, float]]], num_layers: int) -> Table:
    """Middle and spread of every parameter, layer by layer."""
    rows = [[layer, *(_spread(told[target][layer]) for target in told)] for layer in range(num_layers)]
    return Table(f"{name}: predicted, and what holds {WITHIN} % of layers of runs left out", ["layer", *told], rows)


def _spread(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"{middle:.3g} ({low:.3g} .. {high:.3g})"


def wanted(config: str) -> Architecture:
    """The architecture of a run's JSON."""
    keys, name = read_source(Path(config))
    block = keys.get("megastab")
    found = architecture_of(block if isinstance(block, dict) else {})
    if found is None:
        raise UserError(
            f"--config {name} has no megastab.model that can be read: give the JSON of a run (tools/plan.py says what is wrong)"
        )
    return found


def remarks(rows: list[Row], left_out: int, min_r2: float) -> list[str]:
    """What the table itself cannot support."""
    shapes, runs = len({row.architecture for row in rows}), len({row.run for row in rows})
    of = f"{runs} runs of {shapes} architecture{'s' * (shapes != 1)}"
    told = [f"{len(rows)} layers in {of}; {left_out} more, fitted worse than R2 {min_r2:g}, are left out."]
    if shapes == 1:
        told.append("All runs have one architecture: nothing but the depth of a layer can be learned.")
    elif shapes < runs:
        told.append("Some runs share an architecture: 'by run' then still sees its twin, and flatters a new architecture.")
    return told


def _run(arguments: argparse.Namespace) -> None:
    table, output = read(arguments.table), shared.output_of(arguments)
    rows = [row for row in table if row.values["r2"] >= arguments.min_r2]
    check_runs(rows, f"--table {arguments.table} (R2 at least {arguments.min_r2:g})")
    architecture = wanted(arguments.config) if arguments.config else None
    found = [learn(rows, target) for target in TARGETS]
    said = [*remarks(rows, len(table) - len(rows), arguments.min_r2), LEAKY]
    tables, data = [score_table(arguments.table, found)], {"remarks": said, "targets": [_json(each) for each in found]}
    if architecture is not None:
        told = {each.target: predict(rows, each, architecture) for each in found if not each.failure}
        tables.append(prediction_table(arguments.config, told, architecture.num_layers))
        data["prediction"] = {"architecture": architecture._asdict(), "low_middle_high": told}
    output.write("predict", data, tables)
    print("\n".join(said))


def _json(learned: Learned) -> dict[str, Any]:
    scores = {name: {"r2_by_run": score.by_run, "r2_by_layer_leaky": score.by_layer} for name, score in learned.scores.items()}
    worth = learned.scores[learned.best].by_run if learned.best else math.nan
    about = {"target": learned.target, "layers": learned.num_rows, "runs": learned.num_runs, "failure": learned.failure or None}
    return {**about, "best": learned.best or None, "r2_by_run": worth, "models": scores}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", required=True, metavar="FILE", help=".csv or .jsonl that dynamics --table has written, of at least 3 runs"
    )
    parser.add_argument("--config", metavar="JSON", help="a run's JSON whose parameters are to be predicted")
    parser.add_argument("--min-r2", type=float, default=0.5, metavar="R2", help="leave out layers fitted worse (default: %(default)s)")
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("predict", "the curve's parameters from the architecture, cross-validated by run", _add_arguments, _run)
