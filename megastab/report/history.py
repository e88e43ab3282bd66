"""What a run folder's log files hold, as columns for a picture or a summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
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

    def column(self, key: str) -> list[float]:
        """One number a step; NaN where there is none."""
        return _column(self.steps, key)

    def evaluated(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the evaluations."""
        return _column(self.evaluations, "step"), _column(self.evaluations, key)

    def steps_where(self, action: str) -> list[int]:
        """Steps at which ``action`` (``clip``, ``skip``) was taken."""
        return [int(record["step"]) for record in self.steps if record.get("action") == action]

    def summary(self) -> str:
        """One line: how far, how good, how fast, and what went wrong."""
        last, tokens = self.steps[-1], sum(r.get("tokens") or 0 for r in self.steps)
        losses = [value for value in self.column("loss") if value == value]
        seconds = sum(r.get("seconds") or 0.0 for r in self.steps)
        parts = [f"{self.name}: {last['step']} steps", f"{tokens / 1e6:.2f} M tokens"]
        parts += [f"loss {losses[0]:.3f} -> {losses[-1]:.3f} (lowest {min(losses):.3f})"] if losses else ["no finite loss"]
        _, valid = self.evaluated("valid_loss")
        parts += [f"valid {valid[-1]:.3f}"] if valid else []
        parts += [f"{tokens / seconds / 1e3:.1f}k tokens/s"] if seconds else []
        counted = {"clipped": len(self.steps_where("clip")), "skipped": len(self.steps_where("skip"))}
        return ", ".join(parts + [f"{count} {what}" for what, count in counted.items() if count])


def read_history(run_folder: str | Path) -> History:
    """Read ``metrics.jsonl`` and ``events.jsonl``.

    Raises:
        UserError: nothing has been logged there.
    """
    folder = Path(run_folder)
    lines = _lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no step: give the megastab.run.dir of a run that has taken one")
    evaluations = [line for line in lines if "valid_loss" in line]
    return History(folder.resolve().name, steps, evaluations, _lines(folder / "events.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects with a step, one a line; a line cut off by a crash, or not yet whole, is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [float("nan") if record.get(key) is None else float(record[key]) for record in records]
