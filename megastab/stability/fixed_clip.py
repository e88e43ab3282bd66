"""The JSON's ``gradient_clipping``: the rule where no adaptive one is asked for, and the cap over those that are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from megastab.stability.clip_rule import ClipDecision


class FixedClip:
    """Scale by ``cap / (norm + 1e-6)`` above the cap (0: never), skip what is not finite."""

    def __init__(self, cap: float):
        self.cap = cap

    def observe(self, norm: float) -> ClipDecision:
        """Decide for a global norm."""
        threshold = self.cap or None
        if not math.isfinite(norm):
            return ClipDecision(threshold, 0.0, None, "skip", "the gradient norm is not finite")
        scale = factor_under(self.cap, norm)
        return ClipDecision(threshold, scale, None, "clip" if scale < 1 else "apply", "")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a constant has no history."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Nothing to restore, nothing that could differ."""
        return []


def factor_under(cap: float, norm: float) -> float:
    """Torch's and DeepSpeed's factor for a cap (0: none), 1e-6 included."""
    return min(1.0, cap / (norm + 1e-6)) if cap > 0 else 1.0


def capped(decision: ClipDecision, norm: float, cap: float) -> ClipDecision:
    """A rule's decision under a cap on the global norm it does not know itself (0: none)."""
    scale = factor_under(cap, norm)
    if decision.action == "skip" or scale >= decision.scale:
        return decision
    return replace(decision, threshold=cap, scale=scale, action="clip")
