"""ZClip: clip a gradient norm that stands out from its own recent history (arXiv 2504.02507).

    z_t = (g_t - mu) / sigma          a spike when z_t > z_thresh; small norms are never touched
    g*_t = mu + xi(z_t) sigma         xi = z_thresh^2 / z ("reciprocal"), 0 ("mean"), z_thresh ("max"); g*_t = g_t without a spike
    mu <- alpha mu + (1 - alpha) g*_t, then sigma^2 <- alpha sigma^2 + (1 - alpha) (g*_t - mu)^2

A norm goes in, a decision comes out; nothing here knows tensors, ranks or optimizers. With ``compat=True`` the decisions and statistics
are those of the released package zclip 1.0.0, exactly. Without it:

Differs: a norm that is not finite skips the step and is forgotten (released: NaN ends all clipping, inf turns gradients into NaN).
    This one holds with ``compat`` too, as does the skip of a step whose factor would be zero.
Differs: sigma is floored at ``relative_eps * mu``, in z and in g* (released: z over sigma + 1e-6, blind for norms near 1e-6, and with
    sigma = 0 stuck at the mean), and the factor is exactly g*/g (released: g*/(g + 1e-6)). So the rule is scale-free.
Differs: a norm of exactly zero is applied and not counted (released: pulls the mean down and widens sigma).
Differs: warm-up ends in median and MAD (released: mean and variance, which the huge first norms of a run inflate for hundreds of steps).
Differs: after ``rewarm_clipped`` spikes within ``rewarm_window`` steps the statistics restart from those spikes' norms (released: a lasting
    rise by 1.5x or more is clipped for ever).
Differs: ``clip_factor`` acts on sigma's term, as its docstring says (released: on the whole threshold, mean included).
Differs: no fixed cap unless asked for (released: ``max_grad_norm=1.0``, under which ZClip is inert while norms are above 1).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any, Literal

from megastab.stability.clip_rule import SMALLEST_SCALE, ClipDecision, RuleWithState
from megastab.stability.norm_statistics import plain_sample, robust_sample, updated, updated_west
from megastab.stability.zclip_released import released_scale, released_target, released_warmup_scale
from megastab.stability.zclip_settings import check_settings

Mode = Literal["reciprocal", "mean", "max"]
MEANING = ("batch_size", "compat", "cap_statistics")  # after a change of these the old statistics describe something else


class ZClip(RuleWithState):
    """Adaptive clipping of one norm, global or of one parameter; see the module for what it does."""

    SETTINGS = (
        *("alpha", "z_thresh", "mode", "warmup_steps", "max_grad_norm", "clip_factor", "skip_update_on_spike", "compat", "eps"),
        *("relative_eps", "variance", "cap_statistics", "rewarm_clipped", "rewarm_window"),
    )
    STATE = (
        *("mean", "var", "buffer", "num_seen", "num_spikes", "num_rewarms", "spikes_in_a_row", "spike_rate"),
        *("spike_times", "spike_norms", "note"),
    )

    def __init__(
        self,
        alpha: float = 0.97,  # paper's default, as z_thresh, mode and warmup_steps
        z_thresh: float = 2.5,
        mode: Mode = "reciprocal",
        warmup_steps: int = 25,
        max_grad_norm: float | None = None,  # a fixed cap on top; None for none
        clip_factor: float = 1.0,  # 0.5 to 0.9 clips harder (the package's README)
        skip_update_on_spike: bool = False,  # True: a spike's clipped norm does not enter the statistics
        compat: bool = False,
        eps: float = 1e-6,  # added to sigma; compat only, the package's default
        relative_eps: float = 1e-3,  # sigma's floor as a share of mu; not in compat. Norms of real runs vary by 1 % and more
        variance: Literal["paper", "west"] = "paper",  # "west" is the exact exponentially weighted variance
        cap_statistics: bool = False,  # True: the statistics see min(norm, max_grad_norm)
        rewarm_clipped: int = 20,  # 20 of 25: about 21 clipped steps after a shift, no false alarm in 40,000; 0: never
        rewarm_window: int = 25,
        max_nonfinite_in_a_row: int | None = 8,  # one more in a row raises; None never raises
        batch_size: int | None = None,  # global; remembered, because norms depend on it
        on_change: Literal["auto", "keep", "rewarm"] = "auto",  # a state of other settings; auto: rewarm where MEANING changed
    ):
        super().__init__(max_nonfinite_in_a_row)
        self.alpha, self.z_thresh, self.mode, self.warmup_steps = alpha, z_thresh, mode, warmup_steps
        self.max_grad_norm, self.clip_factor, self.skip_update_on_spike = max_grad_norm, clip_factor, skip_update_on_spike
        self.compat, self.eps, self.relative_eps, self.variance = compat, eps, relative_eps, variance
        self.cap_statistics, self.rewarm_clipped, self.rewarm_window = cap_statistics, rewarm_clipped, rewarm_window
        self.batch_size, self.on_change = batch_size, on_change
        check_settings(self.settings, on_change)
        self._updated = updated if variance == "paper" else updated_west
        self._cap = math.inf if max_grad_norm is None else max_grad_norm
        self._smallest_scale = math.ulp(0.0) if compat else SMALLEST_SCALE

        self.mean: float | None = None
        self.var = 0.0
        self.buffer: list[float] = []
        self.num_seen = 0  # norms counted: finite, and not zero
        self.num_spikes = 0
        self.num_rewarms = 0
        self.spikes_in_a_row = 0
        self.spike_rate = 0.0  # share of recent steps that were spikes, averaged with alpha
        # When (num_seen) and how large (raw) the last spikes were.
        self.spike_times: deque[int] = deque(maxlen=rewarm_clipped)
        self.spike_norms: deque[float] = deque(maxlen=rewarm_clipped)
        self.note = ""  # goes with the next decision

    @property
    def phase(self) -> Literal["warmup", "rewarm", "active"]:
        """Whether norms are being collected or judged."""
        if self.mean is not None:
            return "active"
        return "rewarm" if self.num_rewarms else "warmup"

    @property
    def std(self) -> float | None:
        """The sigma that norms are judged by; None while collecting."""
        if self.mean is None:
            return None
        return self.var**0.5 if self.compat else max(self.var**0.5, self.relative_eps * self.mean)

    @property
    def is_inert(self) -> bool:
        """Whether the fixed cap lies so low that ZClip cannot change a step."""
        return self.mean is not None and not self.cap_statistics and self._cap <= self.mean

    @property
    def threshold(self) -> float | None:
        """Norm above which the next step would be clipped; None when nothing would be."""
        if self.mean is None or self.std is None:
            return self.max_grad_norm
        eps = self.eps if self.compat and self.mode != "max" else 0.0
        return min(self.mean + self.z_thresh * (self.std + eps), self._cap)

    def notify_regime_change(self, reason: str = "announced") -> None:
        """Forget the statistics and warm up anew: the batch size, the data, the learning rate or the loss has just changed."""
        self.mean, self.var = None, 0.0
        self.buffer.clear()
        self._restarted(f"ZClip warms up anew: {reason}")

    def observe(self, norm: float) -> ClipDecision:
        """Decide for the norm of a step, then learn from it."""
        norm = float(norm)
        if not 0.0 < norm * norm < math.inf or norm < 0.0:
            nothing = self.unusable(norm, self.threshold)
            if nothing is not None and not (self.compat and nothing.action == "apply"):  # the released package counts a zero
                return nothing
        return self._collect(norm) if self.mean is None else self._judge(norm, self.mean)

    def _collect(self, norm: float) -> ClipDecision:
        """Warm-up: only the cap acts."""
        scale = released_warmup_scale(norm, self._cap) if self.compat else self._cap / norm if norm > self._cap else 1.0
        if scale < self._smallest_scale:
            return self.refuse(norm, self.threshold, f"no factor takes a norm of {norm:g} to {self._cap:g}")
        self.num_seen, self.nonfinite_in_a_row = self.num_seen + 1, 0
        threshold = self.threshold
        self.buffer.append(min(norm, self._cap) if self.cap_statistics else norm)
        if len(self.buffer) >= self.warmup_steps:
            self._start(*(plain_sample if self.compat else robust_sample)(self.buffer))
            self.buffer.clear()
        if scale < 1.0:
            return ClipDecision(threshold, scale, None, "clip", self._why())
        return ClipDecision(threshold, 1.0, None, "apply", self._why())

    def _start(self, mean: float, var: float) -> None:
        """Judge by these statistics from now on."""
        self.mean, self.var = mean, var
        if self.is_inert:
            inert = f"max_grad_norm {self._cap:g} is below the usual norm {mean:.4g}: the cap acts on most steps and ZClip on none"
            warnings.warn(inert, stacklevel=4)
            self.note = self._why(inert)

    def _judge(self, norm: float, mean: float) -> ClipDecision:
        """After warm-up."""
        seen = min(norm, self._cap) if self.cap_statistics else norm
        target: float | None = None
        if self.compat:
            z, edge, target = released_target(seen, mean, self.var, self.mode, self.z_thresh, self.eps, self.clip_factor)
        else:
            std = max(self.var**0.5, self.relative_eps * mean)
            z, edge = (seen - mean) / std, mean + self.z_thresh * std
            if z > self.z_thresh:
                target = mean + self.clip_factor * self._xi(z) * std
        limit = min(norm if target is None else target, self._cap)
        scale = released_scale(norm, limit) if self.compat else limit / norm if norm > limit else 1.0
        if scale < self._smallest_scale:
            return self.refuse(norm, min(edge, self._cap), f"no factor takes a norm of {norm:g} to {limit:g}")
        self.num_seen, self.nonfinite_in_a_row = self.num_seen + 1, 0

        # The cap is not fed back: the statistics follow what ZClip alone would have let through (as released).
        if target is None or not self.skip_update_on_spike:
            self.mean, self.var = self._updated(mean, self.var, seen if target is None else target, self.alpha)
        self.spike_rate *= self.alpha
        if target is None:
            self.spikes_in_a_row = 0
            if scale < 1.0:
                return ClipDecision(self._cap, scale, z, "clip", self._why() if self.note else "")
            return ClipDecision(min(edge, self._cap), 1.0, z, "apply", self._why() if self.note else "")
        self._count_spike(seen)
        return ClipDecision(limit, scale, z, "clip" if scale < 1.0 else "apply", self._why(f"z {z:.3g} is above {self.z_thresh:g}"))

    def _xi(self, z: float) -> float:
        """How many sigmas above the mean a spike is clipped to."""
        if self.mode == "reciprocal":
            return self.z_thresh * self.z_thresh / z
        return 0.0 if self.mode == "mean" else self.z_thresh

    def _count_spike(self, seen: float) -> None:
        """The escape hatch: spikes that keep coming are the new level, and their raw norms tell it."""
        self.num_spikes += 1
        self.spikes_in_a_row += 1
        self.spike_rate += 1 - self.alpha
        if self.compat or not self.rewarm_clipped:
            return
        self.spike_times.append(self.num_seen)
        self.spike_norms.append(seen)
        if len(self.spike_times) == self.rewarm_clipped and self.num_seen - self.spike_times[0] < self.rewarm_window:
            mean, var = robust_sample(self.spike_norms)
            self._restarted(f"ZClip restarts: {self.rewarm_clipped} spikes in {self.rewarm_window} steps are a new level, {mean:.4g}")
            self._start(mean, var)

    def _restarted(self, note: str) -> None:
        self.spike_times.clear()
        self.spike_norms.clear()
        self.spikes_in_a_row, self.spike_rate = 0, 0.0
        self.num_rewarms += 1
        self.note = note

    def _why(self, reason: str = "") -> str:
        """The reason and what is noted, once."""
        note, self.note = self.note, ""
        return f"{reason}; {note}" if reason and note else reason or note

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Take a state back. Other settings or batch size: warn, then keep or forget the statistics as ``on_change`` says."""
        changes, saved = self._take(state), state.get("batch_size")
        if None not in (saved, self.batch_size) and saved != self.batch_size:
            changes["batch_size"] = f"batch_size {saved} -> {self.batch_size}"
        if changes:
            words = "; ".join(changes.values())
            is_anew = self.on_change == "rewarm" or (self.on_change == "auto" and not changes.keys().isdisjoint(MEANING))
            is_anew = is_anew or (self.mean == 0.0 and not self.compat)  # only the released statistics may stand at zero
            if is_anew:
                self.notify_regime_change(f"resumed with {words}")
            done = "the statistics are collected anew" if is_anew else "the statistics are kept"
            warnings.warn(f"ZClip goes on with other settings ({words}): {done}", stacklevel=2)
        return list(changes.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON can hold them) from which a run goes on as if never interrupted."""
        return super().state_dict() | {"batch_size": self.batch_size}
