"""One decision per step, made where the norm is known, equal on every rank because the norm is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megastab.stability.record import Action
from megastab.wrappers.adapter import Adapter


@dataclass(frozen=True)
class Decision:
    """What is to be done with this step's gradients."""

    norm: float
    threshold: float | None
    scale: float
    action: Action
    reason: str = ""


class FixedClip:
    """The JSON's ``gradient_clipping`` as a decision: scale by ``cap / (norm + 1e-6)`` above the cap, skip what is not finite."""

    def __init__(self, cap: float):
        self.cap = cap

    def observe(self, norm: float) -> Decision:
        """Decide for a global norm; 0 as cap means no clipping."""
        threshold = self.cap or None
        if not math.isfinite(norm):
            return Decision(norm, threshold, 0.0, "skip", "the gradient norm is not finite")
        scale = min(1.0, self.cap / (norm + 1e-6)) if self.cap > 0 else 1.0
        return Decision(norm, threshold, scale, "clip" if scale < 1 else "apply")


class Controller:
    """Listens to the norm and keeps the step's decision; the wrapper applies the fixed cap itself."""

    def __init__(self, adapter: Adapter):
        self.rule = FixedClip(adapter.cap)
        self.decision: Decision | None = None
        adapter.on_norm(self.norm_known)

    def norm_known(self, norm: float) -> None:
        """The seam: called once a step on every rank."""
        self.decision = self.rule.observe(norm)
