"""Does a model have massive activations, and where: layers, channels, positions, tokens (arXiv 2402.17762; 2503.22329, section 3).

Largest, median, their ratio and both halves of the rule are told apart, since a model may pass one half alone: in arXiv 2503.22329 TVR
lowers the largest six times and still passes both, while a key-value bias raises it and fails the ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megastab.analysis import arguments as shared
from megastab.analysis.output import Table
from megastab.analysis.stream import Layer, Spot, first_massive, look
from megastab.analysis.subject import Subject
from megastab.telemetry.moments import MASSIVE, MASSIVE_RATIO, Entry

LISTED = 30  # rows of the table of places; the JSON has them all


def _run(arguments: argparse.Namespace) -> None:
    subject, output = shared.subject_of(arguments), shared.output_of(arguments)
    found = {
        shared.setting_name(bos): look(subject, shared.windows_of(arguments, subject, bos), arguments.batch, shared.setting_name(bos))
        for bos in shared.settings_of(arguments, subject)
    }
    tables = [_verdicts(subject, found)]
    tables += [_places(subject, name, layers) for name, layers in found.items() if first_massive(layers) is not None]
    tables += [_layers(subject, name, layers) for name, layers in found.items()]
    output.write("existence", {"model": subject.name, **{name: _data(subject, layers) for name, layers in found.items()}}, tables)


def _verdicts(subject: Subject, found: dict[str, list[Layer]]) -> Table:
    """A column for each setting."""
    columns = [verdict(subject, layers) for layers in found.values()]
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    return Table(f"{subject.name}: massive activations", ["", *found], rows)


def verdict(subject: Subject, layers: list[Layer]) -> dict[str, Any]:
    """What there is, in words."""
    massive = [i for i, layer in enumerate(layers) if layer.spots]
    spots = [spot for layer in layers for spot in layer.spots]
    peak = max(range(len(layers)), key=lambda i: layers[i].seen.largest)
    tokens = sorted({(not spot.is_first, spot.token) for spot in spots})
    largest = layers[peak].seen.top[0]
    return {
        "massive activations": bool(massive),
        "layers": runs(massive) if massive else None,
        "channels": ", ".join(map(str, sorted({spot.channel for spot in spots}))) or None,
        "at the first position": _tokens(subject, [token for later, token in tokens if not later]),
        "at later positions": _tokens(subject, [token for later, token in tokens if later]),
        "windows": f"{max(layer.num_massive_windows for layer in layers)} of {layers[0].num_windows}",
        "largest": f"{largest.value:.5g} after layer {peak}, position {largest.position}, channel {largest.channel}",
        "largest / median there": layers[peak].seen.ratio,
    }


def _tokens(subject: Subject, tokens: Sequence[int], most: int = 6) -> str | None:
    told = ", ".join(subject.token_text(token) for token in tokens[:most])
    return f"{told} and {len(tokens) - most} more" if len(tokens) > most else told or None


def runs(numbers: Sequence[int]) -> str:
    """``1-3, 7`` for 1, 2, 3, 7."""
    pieces: list[list[int]] = []
    for number in sorted(numbers):
        if pieces and pieces[-1][1] == number - 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in pieces)


def _places(subject: Subject, name: str, layers: list[Layer]) -> Table:
    """Massive entries by channel and token, over all layers."""
    at: dict[tuple[int, bool, int], dict[int, Spot]] = {}
    for i, layer in enumerate(layers):
        for spot in layer.spots:
            at.setdefault(spot[:3], {})[i] = spot
    rows: list[list[Any]] = []
    for (channel, is_first, token), spots in at.items():
        largest = max((spot.largest for spot in spots.values()), key=lambda entry: abs(entry.value))
        first = spots[min(spots)]
        where = "first" if is_first else "later"
        rows.append([channel, where, subject.token_text(token), runs(list(spots)), first.num_entries, first.mean, largest.value])
    rows.sort(key=lambda row: -abs(row[-1]))
    columns = ["channel", "position", "token", "layers", "entries at the first of them", "their mean", "largest"]
    title = f"Where, {name}" + (f" ({LISTED} of {len(rows)} places)" if len(rows) > LISTED else "")
    return Table(title, columns, rows[:LISTED])


def _layers(subject: Subject, name: str, layers: list[Layer]) -> Table:
    columns = ["layer", "largest", "where", "second", "third", "median", "ratio"]
    columns += [f"> {MASSIVE:g}", f">= {MASSIVE_RATIO:g} medians", "massive", "in windows"]
    rows = []
    for i, layer in enumerate(layers):
        seen = layer.seen
        values = [entry.value for entry in seen.top] + [None] * (3 - len(seen.top))
        halves = [seen.largest > MASSIVE, seen.median > 0 and seen.ratio >= MASSIVE_RATIO, seen.is_massive]
        windows = f"{layer.num_massive_windows} of {layer.num_windows}"
        rows.append([i, values[0], place(subject, seen.top[0]), *values[1:], seen.median, seen.ratio, *halves, windows])
    return Table(f"After each layer, {name}", columns, rows)


def place(subject: Subject, entry: Entry) -> str:
    """Window, position, token and channel."""
    return f"w{entry.sample} p{entry.position} {subject.token_text(entry.token)} c{entry.channel}"


def _data(subject: Subject, layers: list[Layer]) -> dict[str, Any]:
    def entry(held: Entry) -> dict[str, Any]:
        return {**held._asdict(), "text": subject.token_text(held.token)}

    def layer_data(i: int, layer: Layer) -> dict[str, Any]:
        seen = layer.seen
        return {
            "layer": i,
            "largest": seen.largest,
            "median": seen.median,
            "ratio": seen.ratio,
            "above_100": seen.largest > MASSIVE,
            "above_1000_medians": seen.median > 0 and seen.ratio >= MASSIVE_RATIO,
            "massive": seen.is_massive,
            "windows": layer.num_windows,
            "massive_windows": layer.num_massive_windows,
            "top": [entry(held) for held in seen.top],
            "places": [{**spot._asdict(), "largest": entry(spot.largest)} for spot in layer.spots],
        }

    return {"verdict": verdict(subject, layers), "layers": [layer_data(i, layer) for i, layer in enumerate(layers)]}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_arguments(parser)
    shared.add_text_arguments(parser)
    shared.add_bos_argument(parser)
    shared.add_output_argument(parser)


ANALYSIS = shared.Analysis("existence", "does it have massive activations, and where: layers, channels, tokens", _add_arguments, _run)
