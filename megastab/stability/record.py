"""The record of one step: a line of ``metrics.jsonl`` and the answer to "what happened at step N"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Action = Literal["apply", "clip", "skip"]


@dataclass(frozen=True)
class StepRecord:
    """One attempted optimizer step."""

    step: int
    """1 for the first attempted step."""
    loss: float
    """Mean over the step's targets on all ranks, nats."""
    lr: float
    """Learning rate the step was taken with."""
    grad_norm: float
    """Global L2 norm before clipping; inf when some gradient was not finite."""
    clip_threshold: float | None
    """Norm the gradients were clipped to; None when nothing clips."""
    clip_scale: float
    """Factor applied to the gradients; 0 when the step was skipped."""
    z: float | None
    """Standard score of the norm, where an adaptive method keeps one."""
    action: Action
    """What was done."""
    reason: str
    """Why, in words; empty for an ordinary step."""
    rescaled: int
    """Matrices rescaled after the step."""
    tokens: int
    """Tokens of the step."""
    seconds: float
    """Wall-clock time of the step."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what JSON cannot say (inf, nan) as null."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Event:
    """A line of ``events.jsonl``: something a person should find later."""

    step: int
    kind: str
    """``clip``, ``skip``, ``norm_spike``, ``loss_spike``, ``replay``, ``rewind``, ``rescale``, ``qk_clip``, ``massive_activation``,
    ``straggler``, ``warning``, ``settings``, ``resume``, ``save``, ``stop`` or ``hang``."""
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and names beside the reason, such as ``norm``, ``z``, ``threshold``, ``top`` and ``samples``."""

    def to_json(self) -> dict[str, Any]:
        """Plain values on one level; what JSON cannot say (inf, nan) as null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.facts.items()}
        return {"step": self.step, "kind": self.kind, "reason": self.reason, **plain}
