"""The look inside on sampled steps: hooks go on before the step and off after it, and one collective brings the ranks together.

On other steps nothing is installed, so that not a kernel is added. Compiled code runs as written on a sampled step, or the hooks inside it
would not fire.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megastab.config.schema_telemetry import TelemetryConfig
from megastab.data.batches import MicroBatch
from megastab.model.eager import eagerly
from megastab.parallel import collectives
from megastab.stability.controller import Controller
from megastab.stability.record import Event
from megastab.telemetry.activations import ActivationWatch, Place, newly_massive
from megastab.telemetry.attention import AttentionWatch
from megastab.telemetry.heads import Head, layer_facts, layer_scalars
from megastab.telemetry.moments import Entry, Summary
from megastab.telemetry.weights import MatrixSummary, WeightWatch


@dataclass(frozen=True)
class Sample:
    """What was seen on one step, equal on every rank."""

    step: int
    activations: dict[Place, Summary] = field(default_factory=dict)
    weights: dict[str, MatrixSummary] = field(default_factory=dict)
    """By canonical name."""
    attention: dict[int, tuple[Head, ...]] = field(default_factory=dict)
    """By layer, its heads."""

    def to_json(self) -> dict[str, Any]:
        """A line of ``telemetry.jsonl``; what JSON cannot say (inf, nan) as null."""
        line: dict[str, Any] = {"step": self.step}
        if self.activations:
            line["activations"] = [_activation(place, seen) for place, seen in self.activations.items()]
        if self.attention:
            line["attention"] = [layer_facts(layer, heads) for layer, heads in self.attention.items()]
        if self.weights:
            named = self.weights.items()
            line["weights"] = [{"name": name, **{k: _plain(v) for k, v in seen._asdict().items()}} for name, seen in named]
        return line

    def by_tag(self) -> dict[str, dict[str, float]]:
        """Values by key of ``tags.SAMPLED``, each by what follows its tag's name."""
        values: dict[str, dict[str, float]] = {}
        for place, seen in self.activations.items():
            for key, value in _scalars(seen).items():
                if math.isfinite(value):
                    values.setdefault(key, {})[f"{place.site}/layers.{place.layer}"] = value
        for layer, heads in self.attention.items():
            for key, value in layer_scalars(heads).items():
                if math.isfinite(value):
                    values.setdefault(f"attention_{key}", {})[f"layers.{layer}"] = value
        for name, matrix in self.weights.items():
            for key, value in matrix._asdict().items():
                if math.isfinite(value):
                    values.setdefault(f"matrix_{key}", {})[name] = value
        return values


def _scalars(seen: Summary) -> dict[str, float]:
    named = {"max": seen.largest, "median": seen.median, "max_over_median": seen.ratio, "rms": seen.rms}
    named |= {"kurtosis_first": seen.kurtosis_first, "kurtosis_rest": seen.kurtosis_rest}
    return {f"activation_{key}": value for key, value in named.items()}


def _activation(place: Place, seen: Summary) -> dict[str, Any]:
    named = {key.removeprefix("activation_"): _plain(value) for key, value in _scalars(seen).items()}
    facts = {"is_massive": seen.is_massive, "num_nonfinite": seen.num_nonfinite, "top": list(map(entry_facts, seen.top))}
    return {**place._asdict(), **named, **facts}


def entry_facts(entry: Entry) -> dict[str, Any]:
    """An entry as plain values."""
    return {**entry._asdict(), "value": _plain(entry.value)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Sampler:
    """Looks inside on the steps ``config`` names.

    Args:
        config: when, and at what.
        controller: of the engine.
        num_layers: of the whole model.
    """

    def __init__(self, config: TelemetryConfig, controller: Controller, num_layers: int):
        self.config, self.controller = config, controller
        adapter, grid = controller.adapter, controller.grid
        is_on = config.interval_steps is not None
        self.activations = ActivationWatch(adapter.engine.module, grid, num_layers) if is_on and config.activations else None
        self.attention = AttentionWatch(adapter.engine.module, grid, num_layers) if is_on and config.attention else None
        watch_weights = is_on and config.weights
        self.weights = WeightWatch(adapter, grid, controller.norms, controller.tvr) if watch_weights else None
        self._step: int | None = None
        self._massive: set[int] = set()
        self._overflown: set[Place] = set()

    def remember(self, events: Sequence[dict[str, Any]]) -> None:
        """Take up the lines of ``events.jsonl`` that stand, so that nothing is told for the first time twice."""
        self._overflown = set()
        self._massive = {event["layer"] for event in events if event.get("kind") == "massive_activation"}

    @contextmanager
    def looking(self, step: int, batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Around step number ``step`` on this rank's micro-batches; does nothing where the step is not sampled."""
        if not self.config.samples(step):
            yield
            return
        self._step = step
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            if self.activations is not None:
                stack.enter_context(self.activations.watching(batches[0]))
            if self.attention is not None:
                stack.enter_context(self.attention.watching())
            if self.weights is not None:
                stack.enter_context(self.weights.watching())
            yield

    def finish(self) -> Sample | None:
        """After the step, on every rank: what all of them saw; None where it was not sampled. One all-reduce over the job."""
        step, self._step = self._step, None
        if step is None:
            return None
        tables = [watch.table() for watch in (self.activations, self.attention, self.weights) if watch is not None]
        whole = torch.cat(tables)
        collectives.sum_doubles_(whole, collectives.job_group())  # over (tp x dp x pp): each rank has its own places, or its own terms
        parts = iter(whole.split([len(table) for table in tables]))
        activations = self.activations.read(next(parts)) if self.activations is not None else {}
        attention = self.attention.read(next(parts)) if self.attention is not None else {}
        norm = math.nan if self.controller.norm is None else self.controller.norm
        return Sample(step, activations, self.weights.read(next(parts), norm) if self.weights is not None else {}, attention)

    def events(self, sample: Sample) -> list[Event]:
        """What is in ``sample`` for the first time and a person should know of."""
        events = []
        for layer, seen in newly_massive(sample.activations, self._massive).items():
            self._massive.add(layer)
            first = seen.top[0]
            facts = {"layer": layer, "largest": seen.largest, "median": seen.median, "ratio": seen.ratio}
            events.append(Event(sample.step, "massive_activation", _described(layer, seen), {**facts, **entry_facts(first)}))
        for place, seen in sample.activations.items():
            if seen.num_nonfinite and place not in self._overflown:
                self._overflown.add(place)
                why = f"layers.{place.layer} {place.site}: {seen.num_nonfinite} activations are not finite; with fp16 use bf16 or fp32"
                events.append(Event(sample.step, "warning", why, {**place._asdict(), "num_nonfinite": seen.num_nonfinite}))
        return events


def _described(layer: int, seen: Summary) -> str:
    first = seen.top[0]
    where = f"channel {first.channel}, position {first.position} of sample {first.sample}, token {first.token}"
    return f"the residual stream after layers.{layer} reaches {first.value:.6g} ({where}), {seen.ratio:.4g} times its median magnitude"
