"""Where the ratios come from: a run's ``telemetry.jsonl``, or checkpoints measured on text. Largest magnitude over median magnitude of the
residual stream after each block.

Differs: arXiv 2508.03616 averages over ten sequences; both sources here take the largest and the median over all tokens looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from megastab.analysis.existence import look
from megastab.analysis.subject import Names, Subject, open_subject
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from megastab.report.history import History, number, read_history, read_run_config


class Architecture(NamedTuple):
    """What a parameter of the curve may depend on, besides the layer."""

    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class Series:
    """One layer's ratios in order of steps, each step once."""

    layer: int
    steps: list[int]
    ratios: list[float]
    left_out: int = 0
    """Samples without a ratio: the median was 0, or something was not finite."""

    def between(self, first: float, last: float) -> Series:
        """Steps from ``first`` to ``last``, both included."""
        kept = [(step, ratio) for step, ratio in zip(self.steps, self.ratios, strict=True) if first <= step <= last]
        return Series(self.layer, [step for step, _ in kept], [ratio for _, ratio in kept], self.left_out)


@dataclass(frozen=True)
class Source:
    """All layers of one training run."""

    name: str
    series: list[Series]
    architecture: Architecture | None
    """None where the run folder or the model does not tell."""
    total_steps: int
    """Steps the run is planned for; the last one seen where nobody says."""


def of_run(folder: str | Path) -> Source:
    """What telemetry saw.

    Raises:
        UserError: not a run folder, or its telemetry was off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {folder}: give the megastab.run.dir of a run, or --checkpoints STEP=FOLDER ...")
    history = read_history(folder)
    found = _by_layer(history)
    if not found:
        raise UserError(
            f"{folder / 'telemetry.jsonl'} holds no activations: train with megastab.telemetry.interval_steps (e.g. 100) and "
            f"megastab.telemetry.activations = true, or measure checkpoints with --checkpoints"
        )
    block = read_run_config(folder).get("megastab")
    block = block if isinstance(block, dict) else {}
    last = max(step for rows in found.values() for step in rows)
    return Source(
        history.name, [_series(layer, found[layer]) for layer in sorted(found)], architecture_of(block), max(last, _planned(block))
    )


def architecture_of(block: dict[str, Any]) -> Architecture | None:
    """From the ``megastab`` section of a run's JSON; None where it has no model that can be understood."""
    try:
        model = ModelConfig.model_validate(block.get("model"))
    except ValidationError:
        return None
    return Architecture(model.num_layers, model.hidden_size, model.num_heads, model.ffn_hidden_size)


def _by_layer(history: History) -> dict[int, dict[int, float]]:
    """layer -> step -> ratio (NaN where there is none). Where a step is there twice, after a rewind, the later one is what went on."""
    found: dict[int, dict[int, float]] = {}
    for sample in history.samples:
        rows = sample.get("activations")
        for row in rows if isinstance(rows, list) else []:
            layer = row.get("layer") if isinstance(row, dict) and row.get("site") == "residual" else None
            if isinstance(layer, int) and layer >= 0 and sample["step"] >= 0:
                found.setdefault(layer, {})[sample["step"]] = number(row.get("max_over_median"))
    return found


def _series(layer: int, ratios: dict[int, float]) -> Series:
    kept = {step: ratios[step] for step in sorted(ratios) if math.isfinite(ratios[step])}
    return Series(layer, list(kept), list(kept.values()), len(ratios) - len(kept))


def _planned(block: dict[str, Any]) -> int:
    run = block.get("run")
    steps = run.get("total_steps") if isinstance(run, dict) else None
    return steps if isinstance(steps, int) else 0


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A checkpoint."""

    step: int
    path: Path


def places_of(given: Sequence[str]) -> list[Place]:
    """Checkpoints from ``STEP=FOLDER``, or folders called ``step00000100``; a run folder stands for all it holds."""
    places = [place for text in given for place in _expanded(text)]
    steps = [place.step for place in places]
    if twice := sorted({step for step in steps if steps.count(step) > 1}):
        raise UserError(f"--checkpoints gives step {twice[0]} twice: leave one out")
    return sorted(places)


def _expanded(text: str) -> list[Place]:
    step, sign, path = text.partition("=")
    if sign and step.isdigit():
        return [Place(int(step), Path(path))]
    folder = Path(text)
    tags = sorted((folder / "checkpoints").glob("step*")) if folder.is_dir() else []
    places = [Place(int(found[1]), tag) for tag in tags or [folder] if (found := re.fullmatch(r"step(\d+)", tag.name))]
    if not places:
        raise UserError(f"--checkpoints {text}: give STEP=FOLDER, a folder called step00000100, or a run folder with checkpoints")
    return places


@dataclass(frozen=True)
class Measurement:
    """How checkpoints are looked at."""

    windows: Callable[[Subject], Tensor]
    """What to show a model: [N, S] token ids."""
    batch: int = 1
    dtype: torch.dtype | None = None
    names: Names = Names()


def of_checkpoints(places: Sequence[Place], measurement: Measurement) -> Source:
    """Measure each checkpoint on the same text.

    Raises:
        UserError: one cannot be opened, or they are not of one model.
    """
    by_layer: dict[int, dict[int, float]] = {}
    first = None
    for place in places:
        measured = _measured(place, measurement)
        first = first or measured
        if measured.architecture != first.architecture:
            one, other = (f"{there} is {found.architecture}" for there, found in ((places[0].path, first), (place.path, measured)))
            raise UserError(f"--checkpoints are not of one model: {one}, {other}")
        for layer, ratio in enumerate(measured.ratios):
            by_layer.setdefault(layer, {})[place.step] = ratio
    assert first is not None  # places_of gives at least one
    series = [_series(layer, by_layer[layer]) for layer in sorted(by_layer)]
    return Source(first.name.split("/")[0], series, first.architecture, places[-1].step)


class _Measured(NamedTuple):
    name: str
    architecture: Architecture | None
    ratios: list[float]


def _measured(place: Place, measurement: Measurement) -> _Measured:
    """One checkpoint; its model is gone when the next one is opened."""
    subject = open_subject(place.path, measurement.dtype, None, measurement.names)
    found = look(subject, measurement.windows(subject), measurement.batch, f"step {place.step}")
    return _Measured(subject.name, architecture_of_subject(subject), [layer.seen.ratio for layer in found])


def architecture_of_subject(subject: Subject) -> Architecture | None:
    """Of a model in memory; None where the width of its MLP cannot be told (several, or under a name nobody knows)."""
    down = {row.weight.shape[0 if row.is_transposed else 1] for row in subject.linears() if row.role == "down"}
    return Architecture(len(subject.blocks), subject.hidden_size, subject.heads, int(down.pop())) if len(down) == 1 else None
