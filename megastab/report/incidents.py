"""The steps of a run a person should look at: what the logs say of each, what the loss did around it, and which are worst.

An incident is a step that was skipped, was not finite, was clipped by an adaptive rule, or whose loss stood out. Facts come from the
step's record and from its events; a folder written before events carried facts gives fewer of them and as many incidents. A run whose
config watched neither (a fixed cap knows no spike) is watched here: see ``outliers``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megastab.report.history import History, number

KINDS = ("skip", "loss_spike", "norm_spike", "clip", "replay")  # told in a step's own row; all but norm_spike are events
LOOKED_BACK_STEPS = 20
LOOKED_AHEAD_STEPS = 2
FEWEST_BEFORE = 5  # losses from which a deviation is taken
REACTED_SIGMAS = 4.0  # of three ordinary losses the highest exceeds this about once in 1000 incidents
MAD_TO_STD = 1.4826  # Gaussian
SMALLEST_SPREAD = {"loss": 1e-3, "grad_norm": 1e-2}  # as a share of the value: below, a deviation measures nothing worth a look
OUTLIER_SIGMAS = 7.0  # the spike score's
OUTLIER_BEFORE = (10, 50)  # fewest and most values an outlier is judged by


@dataclass(frozen=True)
class Incident:
    """One step; NaN where a number is not known."""

    step: int
    kinds: tuple[str, ...]
    """Of ``skip``, ``loss_spike``, ``norm_spike``, ``clip``, ``replay``; empty when only a number was not finite."""
    reasons: tuple[str, ...]
    action: str
    """``apply``, ``clip``, ``skip``, or empty when the logs do not say."""
    norm: float
    z: float
    threshold: float
    scale: float
    top: tuple[tuple[str, float], ...]
    """(parameter, share of the squared norm), largest first; the share is NaN where that gradient was not finite."""
    samples: tuple[int, int] | None
    """First and last sample of the batch."""
    left_out: tuple[tuple[int, int], ...]
    """What the batch leaves out between these: first and last of each range."""
    losses: tuple[float | None, float | None, float | None]
    """Just before, at, and just after the step; None where the run has no such step."""
    rise: float
    """Highest loss of the step and the two after it, over the median of the 20 before; inf when one was not finite."""
    rise_sigmas: float
    """The same in robust standard deviations of those 20."""
    outlier_sigmas: float
    """Robust deviations of the loss or norm itself above its past, where that was noticed here."""
    is_finite: bool
    """Whether loss and norm of the step were."""

    @property
    def is_overflow(self) -> bool:
        """A skip of the fp16 loss scaler, which is ordinary."""
        return any(reason.startswith("overflow") for reason in self.reasons)

    @property
    def has_reacted(self) -> bool:
        """Whether the loss rose out of its noise."""
        return self.rise_sigmas >= REACTED_SIGMAS

    def badness(self) -> tuple[float, ...]:
        """Sorts the worst first: not finite, skipped, then by the largest of its deviations, then by the norm."""
        group = 3 if self.is_overflow else 0 if not self.is_finite else 1 if self.action == "skip" else 2
        score = max((x for x in (self.z, self.rise_sigmas, self.outlier_sigmas) if not math.isnan(x)), default=0.0)
        excess = self.norm / self.threshold if self.threshold > 0 and self.norm < math.inf else 0.0
        return (group, -score, -excess, self.step)


def incidents_of(history: History) -> list[Incident]:
    """All incidents of a run, worst first."""
    told: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in history.events:
        if event.get("kind") in KINDS:
            told[event["step"]].append(event)
    losses = history.column("loss")
    for event in _seen_here(history, losses):
        if all(other["kind"] != event["kind"] for other in told[event["step"]]):
            told[event["step"]].append(event)
    place = {record["step"]: i for i, record in enumerate(history.steps)}
    steps = {step for step, events in told.items() if any(event["kind"] != "replay" for event in events)}
    steps |= {record["step"] for record in history.steps if _is_notable(record)}
    found = [_incident(step, history.steps, losses, place.get(step), told[step]) for step in steps]
    return sorted(found, key=Incident.badness)


def _seen_here(history: History, losses: list[float]) -> list[dict[str, Any]]:
    """Spikes nobody logged, as events: of loss and norm where neither the policy nor a clipping rule kept a score of it."""
    norms = _where_unknown(history.column("z"), history.column("grad_norm"))
    losses = _where_unknown(history.column("loss_z"), losses)
    events = []
    for kind, name, key, values in (("loss_spike", "loss", "loss", losses), ("norm_spike", "norm", "grad_norm", norms)):
        for place, sigmas in outliers(values, SMALLEST_SPREAD[key]).items():
            reason = f"the {name} is {sigmas:.0f} robust deviations above the median of the {OUTLIER_BEFORE[1]} before"
            events.append({"step": history.steps[place]["step"], "kind": kind, "reason": reason, "sigmas": sigmas})
    return events


def _where_unknown(scores: list[float], values: list[float]) -> list[float]:
    return [value if math.isnan(score) else math.nan for score, value in zip(scores, values, strict=True)]


def outliers(values: Sequence[float], smallest_spread: float) -> dict[int, float]:
    """Places where a series jumps, with how many robust deviations above the median before; of neighbouring ones only the first."""
    fewest, most = OUTLIER_BEFORE
    found: dict[int, float] = {}
    was_out = False
    for place, value in enumerate(values):
        before = [x for x in values[max(0, place - most) : place] if math.isfinite(x)]
        is_judged = math.isfinite(value) and len(before) >= fewest
        sigmas = _above(before, value, smallest_spread)[1] if is_judged else 0.0
        if sigmas >= OUTLIER_SIGMAS and not was_out:
            found[place] = sigmas
        was_out = sigmas >= OUTLIER_SIGMAS
    return found


def _above(before: Sequence[float], value: float, smallest_spread: float) -> tuple[float, float]:
    """How far a value lies above the median before it, and that in robust deviations."""
    centre = median(before)
    spread = max(MAD_TO_STD * median(abs(x - centre) for x in before), smallest_spread * abs(centre), 1e-12)
    return value - centre, (value - centre) / spread


def _is_notable(record: dict[str, Any]) -> bool:
    """By the record alone. A fixed cap clips as a matter of course; a rule that keeps a z clips what stands out."""
    if record.get("action") == "clip" and not math.isnan(number(record.get("z"))):
        return True
    return record.get("action") == "skip" or not _is_finite(record)


def _is_finite(record: dict[str, Any]) -> bool:
    return all(math.isfinite(number(record[key])) for key in ("loss", "grad_norm") if key in record)


def _incident(step: int, records: list[dict[str, Any]], losses: list[float], place: int | None, events: list[dict[str, Any]]) -> Incident:
    record = {} if place is None else records[place]
    decided = [event for event in events if event["kind"] in ("clip", "skip")]  # the z of a loss spike is the loss's, not the norm's
    kinds: dict[str, None] = dict.fromkeys(event["kind"] for event in sorted(events, key=lambda event: KINDS.index(event["kind"])))
    action = record.get("action") or next((event["kind"] for event in decided), "")
    told = [*([] if decided else [record]), *events]
    reasons = [text for text in (source.get("reason") for source in told) if isinstance(text, str) and text]
    if action in ("clip", "skip") and not decided:
        kinds = {str(action): None, **kinds} if action == "skip" else {**kinds, "clip": None}
    rise, sigmas = loss_rise(losses, place) if place is not None else (math.nan, math.nan)
    return Incident(
        step=step,
        kinds=tuple(kinds),
        reasons=tuple(dict.fromkeys(reasons)),
        action=str(action),
        norm=_first([record], "grad_norm") if record else _first(events, "norm"),
        z=_first([record, *decided], "z"),
        threshold=_first([record, *decided], "clip_threshold", "threshold"),
        scale=_first([record, *decided], "clip_scale", "scale"),
        top=next((top for event in events if (top := _top(event.get("top")))), ()),
        samples=next((pair for event in events if (pair := _samples(event.get("samples")))), None),
        left_out=next((left for event in events if (left := _left_out(event.get("left_out")))), ()),
        losses=_around(losses, place, events),
        rise=rise,
        rise_sigmas=sigmas,
        outlier_sigmas=_first(events, "sigmas"),
        is_finite=_is_finite(record),
    )


def loss_rise(losses: Sequence[float], place: int) -> tuple[float, float]:
    """How far the loss rose at a step or just after it: in nats, and in robust deviations of the losses before; NaN where too few."""
    before = [x for x in losses[max(0, place - LOOKED_BACK_STEPS) : place] if math.isfinite(x)]
    here = losses[place : place + LOOKED_AHEAD_STEPS + 1]
    if not all(map(math.isfinite, here)):
        return math.inf, math.inf
    if len(before) < FEWEST_BEFORE:
        return math.nan, math.nan
    return _above(before, max(here), SMALLEST_SPREAD["loss"])


def _around(losses: Sequence[float], place: int | None, events: list[dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    if place is None:  # the step left events and no record
        said = _first(events, "loss")
        return None, None if math.isnan(said) else said, None
    before = losses[place - 1] if place > 0 else None
    return before, losses[place], losses[place + 1] if place + 1 < len(losses) else None


def _first(sources: list[dict[str, Any]], *keys: str) -> float:
    """The first number found; NaN where there is none."""
    values = (number(source.get(key)) for source in sources for key in keys)
    return next((value for value in values if not math.isnan(value)), math.nan)


def _top(value: Any) -> tuple[tuple[str, float], ...]:
    entries = [entry for entry in value if isinstance(entry, dict) and entry.get("name")] if isinstance(value, list) else []
    return tuple((str(entry["name"]), number(entry.get("share"))) for entry in entries[:5])


def _left_out(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple(pair for each in value if (pair := _samples(each))) if isinstance(value, list) else ()


def _samples(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(x, int) for x in value):
        return value[0], value[1]
    return None
