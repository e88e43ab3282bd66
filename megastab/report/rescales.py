"""Which matrices were rescaled in a run, how often, and how hard at worst."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from megastab.report.history import History, number

# Before events carried facts the name and the two deviations stood in the reason.
OLD_REASON = re.compile(r"(?P<name>\S+): std (?P<std>[-+.\deE]+) over its target (?P<target>[-+.\deE]+?),? ")


@dataclass(frozen=True)
class Rescaled:
    """One matrix."""

    name: str
    times: int
    first_step: int
    last_step: int
    smallest_factor: float
    """Target over standard deviation at its smallest; NaN where the logs do not say."""


def rescaled_matrices(history: History) -> list[Rescaled]:
    """One entry a matrix, the most often rescaled first, then the hardest."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in history.events_of("rescale"):
        name, factor = _name_and_factor(event)
        found[name].append((event["step"], factor))
    entries = [_rescaled(name, looks) for name, looks in found.items()]
    return sorted(entries, key=lambda e: (-e.times, e.smallest_factor if e.smallest_factor == e.smallest_factor else math.inf, e.name))


def _rescaled(name: str, looks: list[tuple[int, float]]) -> Rescaled:
    steps, factors = [step for step, _ in looks], [factor for _, factor in looks if math.isfinite(factor)]
    return Rescaled(name, len(looks), min(steps), max(steps), min(factors, default=math.nan))


def _name_and_factor(event: dict[str, Any]) -> tuple[str, float]:
    old = OLD_REASON.match(f"{event.get('reason', '')} ")
    facts: dict[str, Any] = {**(old.groupdict() if old else {}), **{k: event[k] for k in ("name", "std", "target") if k in event}}
    std, target = (_float(facts.get(key)) for key in ("std", "target"))
    return str(facts.get("name") or "?"), target / std if std > 0 else math.nan


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, str) else number(value)
    except ValueError:
        return math.nan
