"""What is done about a bad step.

    what was seen                                   what is done
    ----------------------------------------------  -----------------------------------------------------------------------
    an fp16 overflow the loss scale can answer      the scaler skips; nothing here counts it
    a norm that is not finite                       skip the step (``on_nonfinite``); the first one is replayed; one more than
                                                    ``max_nonfinite_in_a_row`` in a row ends the run
    a norm whose z is above ``zclip.z_thresh``      clip it, or skip the step (``on_spike``); never a bad step by itself, or
                                                    ZClip's way out of a new level could never act
    a norm above ``norm_spike`` where no rule       written down, with the matrices that carried it
    keeps a score
    a loss whose robust z is above ``loss_spike``   the step is taken, and counted as bad
    ``rewind_after`` bad steps in a row             go back to the last good checkpoint, and on without the bad steps' samples; one
                                                    more than ``max_rewinds`` of them without a step beyond the furthest ends the run

A skipped step leaves weights, moments, schedule and statistics as they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megastab.config.schema_stability import PolicyConfig
from megastab.stability.clip_rule import ClipDecision
from megastab.stability.loss_spikes import LossSpikes


@dataclass(frozen=True)
class Verdict:
    """What the end of a step brings."""

    loss_spike: str = ""
    """Why the loss is an outlier; empty where it is none."""
    rewind: str = ""
    """Why the run is to go back; empty where it goes on."""
    first_bad_step: int | None = None
    """Where the row of bad steps began; the last good checkpoint is older."""


GOOD = Verdict()


class Policy:
    """The table, with its counters. Equal on every rank, because norm and loss are."""

    def __init__(self, config: PolicyConfig, z_thresh: float | None = None):
        self.config, self.z_thresh = config, z_thresh
        self.nonfinite_in_a_row = 0
        self.num_nonfinite = 0
        self.first_bad_step: int | None = None
        self.bad_in_a_row = 0
        self.losses = LossSpikes(config.loss_spike)

    def at_norm(self, norm: float, decision: ClipDecision) -> ClipDecision:
        """The decision as the table has it.

        Raises:
            FloatingPointError: the run is to end.
        """
        if not norm * norm < math.inf:
            self.num_nonfinite += 1
            self.nonfinite_in_a_row += 1
            most = self.config.max_nonfinite_in_a_row
            if self.config.on_nonfinite == "stop":
                raise FloatingPointError(f"{decision.reason}, and policy.on_nonfinite is stop")
            if most is not None and self.nonfinite_in_a_row > most:
                raise FloatingPointError(f"{self.nonfinite_in_a_row} steps in a row could not be used; the last: {decision.reason}")
            return decision
        self.nonfinite_in_a_row = 0
        is_spike = self.z_thresh is not None and decision.z is not None and decision.z > self.z_thresh
        if is_spike and self.config.on_spike == "skip":
            return replace(decision, scale=0.0, action="skip")
        return decision

    @property
    def wants_replay(self) -> bool:
        """Whether the step just decided is the first of the run that is not finite."""
        return self.config.replay_nonfinite and self.num_nonfinite == 1 and self.nonfinite_in_a_row == 1

    def after_step(self, step: int, loss: float | None, is_overflow: bool = False) -> Verdict:
        """Count a step that has been taken; ``loss`` is the global one, None where the loop keeps it to itself."""
        if is_overflow:
            return GOOD
        is_outlier = loss is not None and self.losses.observe(loss)
        if not is_outlier and not self.nonfinite_in_a_row:
            self.bad_in_a_row, self.first_bad_step = 0, None
            return GOOD
        self.bad_in_a_row += 1
        first = self.first_bad_step = step if self.first_bad_step is None else self.first_bad_step
        said = f"loss {loss:.6g} is {self.losses.z:.3g} robust deviations above its median" if is_outlier else ""
        if self.config.rewind_after is None or self.bad_in_a_row < self.config.rewind_after:
            return Verdict(said, "", first)
        why = f"{self.bad_in_a_row} bad steps in a row, from step {first}"
        self.bad_in_a_row, self.first_bad_step = 0, None
        self.losses.restart()
        return Verdict(said, why, first)

    def forget_bad_steps(self, num_nonfinite: int) -> None:
        """After going back: the row of bad steps begins anew, and that the run has met ``num_nonfinite`` of them stays known."""
        self.num_nonfinite = max(num_nonfinite, self.num_nonfinite)
        self.nonfinite_in_a_row = self.bad_in_a_row = 0
        self.first_bad_step = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**counters, "losses": self.losses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as if never interrupted."""
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.losses.load_state_dict(state["losses"])


COUNTERS = ("nonfinite_in_a_row", "num_nonfinite", "first_bad_step", "bad_in_a_row")
