"""The table of fitted layers that ``dynamics --table`` adds to and ``predict`` learns from: CSV, or JSON lines (.jsonl)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megastab.analysis.dynamics_series import Architecture
from megastab.config.errors import UserError

COLUMNS = ("run", "layer", *Architecture._fields, "A", "lambda", "gamma", "t0", "K", "peak_step", "peak_ratio", "r2", "points")
_WHOLE = ("layer", *Architecture._fields, "points")
SUFFIXES = (".csv", ".jsonl")


class Row(NamedTuple):
    """One layer of one run."""

    run: str
    layer: int
    """0-based."""
    architecture: Architecture
    values: dict[str, float]
    """By the columns from ``A`` on."""


def append(path: str | Path, run: str, architecture: Architecture, fits: dict[int, dict[str, Any]]) -> int:
    """Add the fitted layers of a run; returns how many.

    Args:
        path: made where it does not exist.
        run: a name the table does not hold yet.
        architecture: of the run.
        fits: layer -> what ``Fit.to_json`` says.

    Raises:
        UserError: the table holds the run already, or is none.
    """
    path = Path(path)
    known = read(path) if path.exists() else []
    _suffix(path)
    if any(row.run == run for row in known):
        raise UserError(f"--table {path} holds a run {run!r} already: give this one another name with --run-id, or take its lines out")
    rows = [{"run": run, "layer": layer, **architecture._asdict(), **found} for layer, found in sorted(fits.items())]
    lines = [{name: row[name] for name in COLUMNS} for row in rows]
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    is_new_line_missing = bool(text) and not text.endswith("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write("\n" * is_new_line_missing + _text(lines, path.suffix, is_first=not text.strip()))
    return len(lines)


def read(path: str | Path) -> list[Row]:
    """All rows.

    Raises:
        UserError: no such table, or a line that is none.
    """
    path = Path(path)
    _suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--table {path} cannot be read ({error}); make one with analyze.py dynamics RUN --table {path}") from None
    return [_row(given, path, number) for number, given in (_lines(text, path) if path.suffix == ".jsonl" else _records(text))]


def _suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"--table {path}: its name must end in {' or '.join(SUFFIXES)}")


def _text(lines: Sequence[dict[str, Any]], suffix: str, is_first: bool) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(line) + "\n" for line in lines)
    held = io.StringIO()
    writer = csv.DictWriter(held, COLUMNS, lineterminator="\n")
    if is_first:
        writer.writeheader()
    writer.writerows(lines)
    return held.getvalue()


def _records(text: str) -> list[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    return [(reader.line_num, record) for record in reader]


def _lines(text: str, path: Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except ValueError:
            raise UserError(f"--table {path}: line {number} is no JSON") from None
    return found


def _row(given: Any, path: Path, number: int) -> Row:
    where = f"--table {path}, line {number}"
    if not isinstance(given, dict):
        raise UserError(f"{where} is no row: columns are {', '.join(COLUMNS)}")
    if lacking := [name for name in COLUMNS if given.get(name) in (None, "")]:
        raise UserError(f"{where} lacks {', '.join(lacking)}: columns are {', '.join(COLUMNS)}")
    try:
        values = {name: float(given[name]) for name in COLUMNS[1:]}
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    if wrong := [name for name, value in values.items() if not math.isfinite(value) or (name in _WHOLE and value != int(value))]:
        raise UserError(f"{where}: {wrong[0]} = {given[wrong[0]]} is no {'whole ' * (wrong[0] in _WHOLE)}number")
    if wrong := [name for name in (*Architecture._fields, "lambda", "gamma", "t0") if values[name] <= 0]:
        raise UserError(f"{where}: {wrong[0]} = {given[wrong[0]]} must be above 0")
    architecture = Architecture(*(int(values.pop(name)) for name in Architecture._fields))
    layer = int(values.pop("layer"))
    if not 0 <= layer < architecture.num_layers:
        raise UserError(f"{where}: layer = {layer}, but num_layers = {architecture.num_layers} (layers count from 0)")
    return Row(str(given["run"]), layer, architecture, values)
