"""One decision per step, made where the norm is known and equal on every rank because the norm is; and the edits of the masters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megastab.config.errors import TrainingEnded
from megastab.config.schema_stability import PolicyConfig, StabilityConfig
from megastab.parallel import collectives
from megastab.parallel.grid import Grid
from megastab.stability.choice import clipping_rule
from megastab.stability.clip_rule import ClipDecision, ClipRule
from megastab.stability.fixed_clip import FixedClip, capped
from megastab.stability.gradient_norms import GradientNorms, Share, top_shares
from megastab.stability.policy import Policy, Verdict
from megastab.stability.qk_clip import QKClip
from megastab.stability.record import StepRecord
from megastab.stability.rivals import AutoClip, SkipStep
from megastab.stability.scoped import Scoped
from megastab.stability.tvr import TVR, RescaleEvent
from megastab.stability.zclip import ZClip
from megastab.wrappers.adapter import Adapter

RATE_MEMORY = 0.97  # of the share of clipped steps
CAP_WINDOW = 100  # steps over which a cap that binds on more than half is told


class Controller:
    """Listens to the norm, applies the rule's decision through the wrapper, and rescales the masters when it is time."""

    def __init__(
        self,
        adapter: Adapter,
        grid: Grid,
        rule: ClipRule | Scoped,
        tvr: TVR | None = None,
        policy: Policy | None = None,
        norms: GradientNorms | None = None,
        cap: float = 0.0,
        qk_clip: QKClip | None = None,
    ):
        self.adapter, self.grid, self.rule, self.tvr, self.qk_clip = adapter, grid, rule, tvr, qk_clip
        self.cap = cap
        """On the global norm, over a rule that does not know it; 0 for none."""
        self.policy = Policy(PolicyConfig()) if policy is None else policy
        self.norms = GradientNorms(adapter, grid) if norms is None else norms
        spike = self.policy.config.norm_spike
        # ZClip's statistics without its clipping, for a rule that has none and would let a spike pass without a word.
        self._watch = ZClip(z_thresh=spike, max_nonfinite_in_a_row=None) if spike and not isinstance(rule, ZClip | SkipStep) else None
        self.norm_spike = ""
        """Why the norm is one, where the rule does not say; empty otherwise."""
        self.read_loss: Callable[[], float] | None = None
        """Tells the step's global loss at the norm seam, to a rule that judges it (collective over the job); set by the loop."""
        self.norm: float | None = None
        self.decision: ClipDecision | None = None
        self.is_overflow = False
        """Whether the step was an fp16 overflow that the loss scale answers."""
        self.top: list[Share] = []
        """Who carried a norm that stood out; empty for an ordinary step."""
        self.rescaled: list[RescaleEvent] = []
        self.weight_stds: dict[str, float] = {}
        """Standard deviation of every matrix as TVR found it after this step; empty where it did not look."""
        self.clip_rate = 0.0
        """Share of recent steps that were clipped or skipped."""
        self.warning = ""
        """Something to tell once, found in this step."""
        self._bound: deque[bool] = deque(maxlen=CAP_WINDOW)
        self._has_told_cap = False
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
            self._skip()
            return
        self.norm, self.rescaled, self.top, self.norm_spike, self.warning, self._has_looked = norm, [], [], "", "", False
        self.is_overflow = not math.isfinite(norm) and self.adapter.scaler_recovers()
        if self.is_overflow:  # fed to nothing, counted by nobody
            self.decision = ClipDecision(None, 0.0, None, "skip", "overflow: the fp16 loss scale falls")
        else:
            self.decision, scale = self._decide(norm)
            self.clip_rate += (1 - RATE_MEMORY) * ((self.decision.scale < 1.0) - self.clip_rate)
        if self.decision.action == "skip":
            self._skip()
        else:
            self.adapter.set_scale(scale)

    def _skip(self) -> None:
        self.adapter.skip()
        if self.qk_clip is not None:
            self.qk_clip.forget()

    def _decide(self, norm: float) -> tuple[ClipDecision, float]:
        """The rule's decision under cap and policy, and the factor that is left for the wrapper."""
        rule, factors = self.rule, dict[str, float]()
        try:
            if isinstance(rule, Scoped):
                decided, factors = rule.observe(norm, self.norms.by_name(norm))
            elif isinstance(rule, SkipStep) and self.read_loss is not None:
                decided = rule.observe(norm, self.read_loss())
            else:
                decided = rule.observe(norm)
            decision = self.policy.at_norm(norm, capped(decided, norm, self.cap))
        except FloatingPointError as error:
            why = f"training stopped: {error}. Resume from the last checkpoint with a lower optimizer.params.lr"
            collectives.fail_alike(why, TrainingEnded)
        self.norm_spike = self._spike(norm) if self._watch is not None else ""
        if decision.reason or self.norm_spike:
            self.top = top_shares(self.norms.squares())  # before anything is scaled, and only for a step that stands out
        self._watch_cap(norm, decision)
        if not factors or decision.action == "skip":
            return decision, decision.scale
        self.norms.scale_(factors)  # each matrix by its own factor; the wrapper has the cap's to apply
        return decision, min(1.0, decision.scale / decided.scale)

    def _spike(self, norm: float) -> str:
        assert self._watch is not None
        z = self._watch.observe(norm).z
        return f"norm {norm:.6g} is {z:.3g} deviations above its recent mean" if z is not None and z > self._watch.z_thresh else ""

    def _watch_cap(self, norm: float, decision: ClipDecision) -> None:
        """Tell once where the cap decides about most steps, and the adaptive rule about few."""
        cap = self.adapter.cap
        if not cap or self._has_told_cap or not isinstance(self.rule, ZClip | AutoClip):
            return
        self._bound.append(decision.threshold == cap and decision.action == "clip")
        if len(self._bound) == CAP_WINDOW and sum(self._bound) > CAP_WINDOW / 2:
            self._has_told_cap = True
            self.warning = (
                f"gradient_clipping {cap:g} decided {sum(self._bound)} of the last {CAP_WINDOW} steps (norm {norm:.4g} now), so that "
                f"{type(self.rule).__name__} does next to nothing: set gradient_clipping to a few times the usual norm (0.0 is no cap)"
            )

    def weights_updated(self) -> bool:
        """The seam between update and publication: called on applied steps only; whether a master was changed."""
        is_rescaled = self._rescale()
        is_clipped = self.qk_clip is not None and self.qk_clip.clip_fragments_(self.adapter.fragments())
        return is_rescaled or is_clipped

    def _rescale(self) -> bool:
        if self.tvr is None or not self.tvr.advance():
            return False
        self._has_looked = True
        held = list(self.adapter.fragments())
        self.rescaled = self.tvr.rescale_fragments_(held, self._matrices, self.grid.stage.group, self._counts_fragments)
        return bool(self.rescaled)

    @property
    def _counts_fragments(self) -> bool:
        # Without partitions every data-parallel rank holds all fragments: the first one contributes them.
        return self.adapter.is_partitioned or self.grid.dp.rank == 0

    def start_warning(self) -> str:
        """What to say before the first step of a new run; empty if nothing (collective over the job where TVR is on)."""
        if self.tvr is None:
            return ""
        held, grid = list(self.adapter.fragments()), self.grid
        return self.tvr.start_warning(held, self._matrices, grid.stage.group, self._counts_fragments, grid.pp.group) or ""

    def step_done(self) -> None:
        """After the step, on every rank: bring together what the pipeline stages saw and rescaled (only where there was a look)."""
        self.weight_stds = {}
        if self._has_looked and self.tvr is not None:
            stages = collectives.gather_objects_in((self.rescaled, self.tvr.stds), self.grid.pp.group)  # a stage knows its own matrices
            self.rescaled = [event for rescaled, _ in stages for event in rescaled]
            self.weight_stds = {name: std for _, stds in stages for name, std in stds.items()}

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

    def judge(self, step: int, loss: float | None) -> Verdict:
        """Count the step just taken as good or bad; what the policy wants done. ``loss`` is the global one, None where it is not known."""
        return self.policy.after_step(step, loss, self.is_overflow)

    def scalars(self) -> dict[str, float]:
        """What a plot shows beside the record, by tag key."""
        out = {"clip_rate": self.clip_rate}
        if self.norm is not None and self.decision is not None and self.decision.action != "skip":
            out["clipped_norm"] = self.norm * self.decision.scale
        if isinstance(self.rule, ZClip) and self.rule.mean is not None and self.rule.std is not None:
            out |= {"clip_mean": self.rule.mean, "clip_std": self.rule.std}
        if self.qk_clip is not None and math.isfinite(self.qk_clip.largest):
            out |= {"largest_logit": self.qk_clip.largest, "qk_clipped": float(len(self.qk_clip.clipped))}
        if self.policy.losses.z is not None:
            out["loss_z"] = self.policy.losses.z
        return out

    def state_dict(self) -> dict[str, Any]:
        """Plain values, equal on every rank."""
        tvr = self.tvr.state_dict() if self.tvr is not None else {}
        watch = {} if self._watch is None else self._watch.state_dict()
        policy = self.policy.state_dict()
        return {"clip": self.rule.state_dict(), "tvr": tvr, "policy": policy, "watch": watch, "clip_rate": self.clip_rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a checkpoint; what it does not know, or another rule's state, starts fresh. Returns what differs, in words."""
        differs: list[str] = []
        saved, mine = state.get("clip") or {}, self.rule.state_dict().get("rule", "fixed")
        if saved and saved.get("rule") == mine:
            differs += self.rule.load_state_dict(saved)
        elif saved or not isinstance(self.rule, FixedClip):
            then = "it has no statistics" if mine == "fixed" else "it starts with a warm-up"
            differs.append(f"clipping was {saved.get('rule', 'fixed')}, is {mine}: {then}")
        if self.tvr is not None and state.get("tvr"):
            self.tvr.load_state_dict(state["tvr"])
        if state.get("policy"):
            self.policy.load_state_dict(state["policy"])
        if self._watch is not None and state.get("watch"):
            self._watch.load_state_dict(state["watch"])
        self.clip_rate = float(state.get("clip_rate", 0.0))
        return differs


def go_back(controller: Controller, state: Mapping[str, Any]) -> None:
    """The state of a checkpoint before bad steps, in the run that met them; the policy counts from none."""
    policy = controller.policy
    met = policy.num_nonfinite
    controller.load_state_dict(state)
    policy.forget_bad_steps(met)


def build_controller(
    adapter: Adapter,
    grid: Grid,
    config: StabilityConfig,
    batch_size: int,
    tokens_per_step: int | None = None,
    qk_clip: QKClip | None = None,
) -> Controller:
    """The controller a config asks for. The JSON's ``gradient_clipping`` is a fixed cap over the adaptive rule (0: none), or the rule;
    ``qk_clip`` is built by who knows the model."""
    tvr = TVR(**config.tvr.model_dump(), tokens_per_step=tokens_per_step) if config.tvr is not None else None
    policy = Policy(config.policy, config.zclip.z_thresh if config.zclip is not None and config.zclip.scope == "global" else None)
    norms = GradientNorms(adapter, grid)
    rule = clipping_rule(config, adapter.cap, batch_size, norms.layers)
    cap = 0.0 if isinstance(rule, FixedClip | ZClip) else adapter.cap
    return Controller(adapter, grid, rule, tvr, policy, norms, cap, qk_clip)
