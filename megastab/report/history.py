"""What a run folder's files hold, as columns for a picture, a page or a summary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megastab.config.errors import UserError


@dataclass(frozen=True)
class History:
    """Steps and evaluations of one run, in file order. A value JSON could not say (inf, nan) is None."""

    name: str
    steps: list[dict[str, Any]]
    """StepRecords and the rates beside them."""
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    """Those that stand."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``telemetry.jsonl``: the looks inside the model."""
    undone: list[dict[str, Any]] = field(default_factory=list)
    """Events of steps that were taken back, by a rewind or by a resume from an older checkpoint."""
    rank_times: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``rank_times.jsonl``: every rank's own seconds, window by window."""

    def column(self, key: str) -> list[float]:
        """One number a step; NaN where there is none."""
        return _column(self.steps, key)

    def evaluated(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the evaluations."""
        return _column(self.evaluations, "step"), _column(self.evaluations, key)

    def steps_where(self, action: str) -> list[int]:
        """Steps at which ``action`` (``clip``, ``skip``) was taken."""
        return [int(record["step"]) for record in self.steps if record.get("action") == action]

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in self.events if event.get("kind") == kind]

    def summary(self) -> str:
        """One line: how far, how good, how fast, and what went wrong."""
        tokens, seconds = (sum(filter(math.isfinite, self.column(key))) for key in ("tokens", "seconds"))
        losses = list(filter(math.isfinite, self.column("loss")))
        parts = [f"{self.name}: {self.steps[-1]['step']} steps", f"{tokens / 1e6:.2f} M tokens"]
        parts += [f"loss {losses[0]:.3f} -> {losses[-1]:.3f} (lowest {min(losses):.3f})"] if losses else ["no finite loss"]
        _, valid = self.evaluated("valid_loss")
        parts += [f"valid {valid[-1]:.3f}"] if valid else []
        parts += [f"{tokens / seconds / 1e3:.1f}k tokens/s"] if seconds else []
        spikes, rewinds = len({event["step"] for event in self.events_of("loss_spike")}), len(self.events_of("rewind"))
        counted = {"clipped": len(self.steps_where("clip")), "skipped": len(self.steps_where("skip"))}
        counted |= {"loss spike" if spikes == 1 else "loss spikes": spikes, "rewind" if rewinds == 1 else "rewinds": rewinds}
        return ", ".join(parts + [f"{count} {what}" for what, count in counted.items() if count])


def read_history(run_folder: str | Path) -> History:
    """Read ``metrics.jsonl``, ``events.jsonl``, ``telemetry.jsonl`` and ``rank_times.jsonl``.

    Raises:
        UserError: nothing has been logged there, or it cannot be read.
    """
    folder = Path(run_folder)
    lines = _lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no step: give the megastab.run.dir of a run that has taken one")
    evaluations = [line for line in lines if "valid_loss" in line]
    events: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for event in _lines(folder / "events.jsonl"):
        events[bool(event.get("undone"))].append(event)
    samples, rank_times = (_lines(folder / name) for name in ("telemetry.jsonl", "rank_times.jsonl"))
    return History(folder.resolve().name, steps, evaluations, events[False], samples, events[True], rank_times)


def read_run_config(run_folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a run folder; empty where there is none, or none that can be understood."""
    path = Path(run_folder) / "config.json"
    try:
        value = json.loads(_text(path) or "null")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A logged value as a float; NaN where it is missing, or no number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer beyond every float
        return math.nan


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects with a step, one a line; a line cut off by a crash, or not yet whole, is left out."""
    found = []
    for line in _text(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _text(path: Path) -> str:
    """What a file says; nothing when there is no such file. A byte that is no text spoils its own line only."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [number(record.get(key)) for record in records]
