"""What every clipping rule answers and can do: see a norm once a step, tell its state, take a state back.

A rule is scalar arithmetic in Python floats (fp64): equal norms give equal decisions on every rank, without a collective. What rules
share is here: a norm that is not finite is skipped and fed to nothing, and a state remembers the settings it was made with.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from megastab.stability.record import Action

STATE_VERSION = 1
COUNTERS = ("num_nonfinite", "nonfinite_in_a_row")
# Below the smallest normal fp32 number a factor would turn gradients into zeros: such a step is skipped instead.
SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True, slots=True)
class ClipDecision:
    """What is to be done with this step's gradients."""

    threshold: float | None
    """Norm the gradients are clipped to; on an ordinary step the norm above which they would have been; None when nothing clips."""
    scale: float
    """Factor for the gradients, in (0, 1]; 0.0 when the step is to be skipped (never multiply by it)."""
    z: float | None
    """Standard score of the norm; None while no statistics exist."""
    action: Action
    """What the factor means."""
    reason: str = ""
    """Why, in words; empty for an ordinary step."""


class ClipRule(Protocol):
    """Anything that turns the norm of a step into a decision."""

    def observe(self, norm: float) -> ClipDecision:
        """Decide for a norm; to be called exactly once for each step that reaches the optimizer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON can hold them) from which a run goes on as if never interrupted."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take a state back; what differs from it, in words (also given as a warning)."""
        ...


class RuleWithState:
    """A rule's memory of its own settings, and its way with norms that are not finite."""

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    """Attributes that were given to the constructor and decide what the rule does."""
    STATE: ClassVar[tuple[str, ...]] = ()
    """Attributes that change from step to step: numbers, or flat lists and deques of numbers."""

    def __init__(self, max_nonfinite_in_a_row: int | None):
        if max_nonfinite_in_a_row is not None and max_nonfinite_in_a_row < 1:
            raise ValueError(f"max_nonfinite_in_a_row must be at least 1, or None for no limit; it is {max_nonfinite_in_a_row}")
        self.max_nonfinite_in_a_row = max_nonfinite_in_a_row
        self.num_nonfinite = 0
        self.nonfinite_in_a_row = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the rule was made with."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def refuse(self, norm: float, threshold: float | None, why: str = "") -> ClipDecision:
        """Skip a step whose gradients cannot be scaled; nothing but the counters learns of it."""
        self.num_nonfinite += 1
        self.nonfinite_in_a_row += 1
        if not why:
            why = f"the gradient norm is {norm:g}, which no norm is" if -math.inf < norm < 0 else "the gradient norm is not finite"
        if self.max_nonfinite_in_a_row is not None and self.nonfinite_in_a_row > self.max_nonfinite_in_a_row:
            raise FloatingPointError(f"{self.nonfinite_in_a_row} steps in a row could not be used; the last: {why}")
        return ClipDecision(threshold, 0.0, None, "skip", why)

    def unusable(self, norm: float, threshold: float | None) -> ClipDecision | None:
        """The decision for a norm that tells nothing: not finite (its square neither), negative, or zero; None for any other."""
        if not (norm >= 0.0 and norm * norm < math.inf):  # some engines report a norm that is not finite as -1
            return self.refuse(norm, threshold)
        if norm * norm > 0.0:
            return None
        self.nonfinite_in_a_row = 0
        return ClipDecision(threshold, 1.0, None, "apply", "the gradient norm is zero: not counted")

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON can hold them) from which a run goes on as if never interrupted."""
        kept = {name: getattr(self, name) for name in (*COUNTERS, *self.STATE)}
        plain = {name: list(value) if isinstance(value, (list, deque)) else value for name, value in kept.items()}
        return {"rule": type(self).__name__, "version": STATE_VERSION, "settings": self.settings, **plain}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take a state back; settings that differ are returned in words and warned of, the state is kept all the same."""
        changes = self._take(state)
        if changes:
            warnings.warn(f"{type(self).__name__} goes on with other settings ({'; '.join(changes.values())})", stacklevel=2)
        return list(changes.values())

    def _take(self, state: dict[str, Any]) -> dict[str, str]:
        """Take a state back, wholly or not at all; the settings that differ, by name, in words."""
        mine = type(self).__name__
        if state.get("rule") != mine or state.get("version") != STATE_VERSION:
            found = f"rule {state.get('rule')!r}, version {state.get('version')!r}"
            raise ValueError(f"this is not the state of {mine}, version {STATE_VERSION}, but of {found}")
        names = (*COUNTERS, *self.STATE)
        if missing := [name for name in ("settings", *names) if name not in state]:
            raise ValueError(f"the state of {mine} lacks {', '.join(missing)}")
        for name in names:
            old, new = getattr(self, name), state[name]
            if isinstance(old, deque):
                new = deque(new, maxlen=old.maxlen)
            setattr(self, name, list(new) if isinstance(new, list) else new)
        saved = state["settings"]
        return {name: f"{name} {saved.get(name)} -> {value}" for name, value in self.settings.items() if saved.get(name) != value}


def demand(is_met: bool, name: str, settings: dict[str, Any], rule: str) -> None:
    """Refuse a value, saying what it must be."""
    if not is_met:
        raise ValueError(f"{name} must be {rule}; it is {settings[name]!r}")
