"""One decision per step, made where the norm is known and equal on every rank because the norm is; and the edits of the masters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megastab.config.schema import StabilityConfig
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.stability.clip_rule import ClipDecision, ClipRule
from megastab.stability.record import StepRecord
from megastab.stability.tvr import TVR, RescaleEvent
from megastab.stability.zclip import ZClip
from megastab.wrappers.adapter import Adapter


class FixedClip:
    """The JSON's ``gradient_clipping``: scale by ``cap / (norm + 1e-6)`` above the cap (0: never), skip what is not finite."""

    def __init__(self, cap: float):
        self.cap = cap

    def observe(self, norm: float) -> ClipDecision:
        """Decide for a global norm."""
        threshold = self.cap or None
        if not math.isfinite(norm):
            return ClipDecision(threshold, 0.0, None, "skip", "the gradient norm is not finite")
        scale = min(1.0, self.cap / (norm + 1e-6)) if self.cap > 0 else 1.0
        return ClipDecision(threshold, scale, None, "clip" if scale < 1 else "apply", "")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a constant has no history."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Nothing to restore, nothing that could differ."""
        return []


class Controller:
    """Listens to the norm, applies the rule's decision through the wrapper, and rescales the masters when it is time."""

    def __init__(self, adapter: Adapter, grid: Grid, rule: ClipRule, tvr: TVR | None = None):
        self.adapter, self.grid, self.rule, self.tvr = adapter, grid, rule, tvr
        self.norm: float | None = None
        self.decision: ClipDecision | None = None
        self.rescaled: list[RescaleEvent] = []
        self._has_looked = False
        self._rehearsed: list[float] | None = None
        # Every rank of a stage must list the same matrices, also those it holds nothing of.
        catalogue = [(info, part) for info in map(adapter.info, adapter.parameters()) for part in info.parts]
        self._matrices = tvr.selected(catalogue) if tvr is not None else []
        adapter.on_norm(self.norm_known)
        adapter.after_update(self.weights_updated)

    @contextmanager
    def rehearsal(self) -> Iterator[list[float]]:
        """Steps taken inside change nothing: no update, nothing learnt, no record. Yields the norms they form."""
        self._rehearsed = []
        try:
            yield self._rehearsed
        finally:
            self._rehearsed = None

    def norm_known(self, norm: float) -> None:
        """The seam where the decision is made: called once a step on every rank, before anything is scaled."""
        if self._rehearsed is not None:
            self._rehearsed.append(norm)
            self.adapter.skip()
            return
        self.norm, self.decision, self.rescaled = norm, self._decide(norm), []
        self._has_looked = False
        if self.decision.action == "skip":
            self.adapter.skip()
        else:
            self.adapter.set_scale(self.decision.scale)

    def _decide(self, norm: float) -> ClipDecision:
        if not math.isfinite(norm) and self.adapter.scaler_recovers():
            return ClipDecision(None, 0.0, None, "skip", "overflow: the fp16 loss scale falls")  # fed to nothing, counted by nobody
        try:
            return self.rule.observe(norm)
        except FloatingPointError as error:
            collectives.fail_alike(f"training stopped: {error}. Resume from the last checkpoint with a lower optimizer.params.lr")

    def weights_updated(self) -> bool:
        """The seam between update and publication: called on applied steps only; whether a master was changed."""
        if self.tvr is None or not self.tvr.advance():
            return False
        self._has_looked = True
        # Without partitions every data-parallel rank holds all fragments: the first one contributes them.
        counts = self.adapter.is_partitioned or self.grid.dp.rank == 0
        held = list(self.adapter.fragments())
        self.rescaled = self.tvr.rescale_fragments_(held, self._matrices, self.grid.stage.group, counts)
        return bool(self.rescaled)

    def step_done(self) -> None:
        """After the step, on every rank: bring together what the pipeline stages rescaled (only where there was a look)."""
        if self._has_looked:
            stages = collectives.gather_objects_in(self.rescaled, self.grid.pp.group)  # over pp: a stage knows its own matrices
            self.rescaled = [event for stage in stages for event in stage]

    def record(self, *, step: int, loss: float, lr: float, tokens: int, seconds: float) -> StepRecord:
        """The step just taken: what the loop knows of it, and what was seen and decided here."""
        norm, decision = self.norm, self.decision
        assert norm is not None and decision is not None, "a step forms exactly one norm"
        return StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            clip_threshold=decision.threshold,
            clip_scale=decision.scale,
            z=decision.z,
            action=decision.action,
            reason=decision.reason,
            rescaled=len(self.rescaled),
            tokens=tokens,
            seconds=seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on every rank."""
        return {"clip": self.rule.state_dict(), "tvr": self.tvr.state_dict() if self.tvr is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a checkpoint; what it does not know, or another rule's state, starts fresh. Returns what differs, in words."""
        differs: list[str] = []
        saved = state.get("clip") or {}
        if saved.get("rule") == type(self.rule).__name__:
            differs += self.rule.load_state_dict(saved)
        elif saved or not isinstance(self.rule, FixedClip):
            differs.append(f"clipping was {saved.get('rule', 'fixed')}, is {type(self.rule).__name__}: it starts with a warm-up")
        if self.tvr is not None and state.get("tvr"):
            self.tvr.load_state_dict(state["tvr"])
        return differs


def build_controller(adapter: Adapter, grid: Grid, config: StabilityConfig, batch_size: int) -> Controller:
    """The controller a config asks for. The JSON's ``gradient_clipping`` is ZClip's fixed cap (0: none), or the rule without it."""
    rule: ClipRule = FixedClip(adapter.cap)
    if config.zclip is not None:
        rule = ZClip(**config.zclip.model_dump(), max_grad_norm=adapter.cap or None, batch_size=batch_size)
    tvr = TVR(**config.tvr.model_dump()) if config.tvr is not None else None
    return Controller(adapter, grid, rule, tvr)
