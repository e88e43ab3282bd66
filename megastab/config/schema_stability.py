"""Sections of ``"stability"`` in the JSON: the methods' own settings, one pydantic model each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megastab.config.section import Section

CLIPPING = ("zclip", "autoclip", "adagc", "skip_step")  # sections of StabilityConfig, at most one of which is given


class ZClipConfig(Section):
    """Adaptive clipping on the global gradient norm (arXiv 2504.02507); ``gradient_clipping`` is its fixed cap on top, 0 for none."""

    alpha: float = Field(default=0.97, gt=0.0, lt=1.0)
    """Memory of the running mean and variance of the norm."""
    z_thresh: PositiveFloat = 2.5
    """Standard score above which a norm is a spike."""
    mode: Literal["reciprocal", "mean", "max"] = "reciprocal"
    """What a spike is clipped to: mean + z_thresh^2 / z std, the mean, or mean + z_thresh std."""
    warmup_steps: PositiveInt = 25
    """Steps that only collect norms."""
    clip_factor: PositiveFloat = 1.0
    """Multiplies the std term; below 1 clips harder."""
    skip_update_on_spike: bool = False
    """Keep a spike's clipped norm out of the statistics."""
    compat: bool = False
    """Decide exactly as the released package zclip 1.0.0 does."""
    rewarm_clipped: NonNegativeInt = 20
    """Spikes within ``rewarm_window`` steps after which the statistics start again from them; 0 never does."""
    rewarm_window: PositiveInt = 25
    """Steps ``rewarm_clipped`` looks back."""
    on_change: Literal["auto", "keep", "rewarm"] = "auto"
    """On resume with other settings: keep the statistics or warm up again; ``auto`` re-warms when the batch size changed."""
    scope: Literal["global", "layer", "parameter"] = "global"
    """What has statistics of its own: the whole gradient, or each block's, or each logical matrix's, which costs one small all-reduce
    a step and changes the gradient's direction. The cap stays on the global norm."""


class AutoClipConfig(Section):
    """A baseline beside ZClip: clip to a percentile of all norms so far (arXiv 2007.14469)."""

    percentile: float = Field(default=10.0, ge=0.0, le=100.0)
    """Of the norms so far, the current one included; at 10 about nine steps in ten are clipped."""
    window: PositiveInt | None = None
    """Norms remembered; ``null``, the published method, never forgets."""


class AdaGCConfig(Section):
    """A baseline beside ZClip: clip each matrix's gradient to its own average of clipped norms (arXiv 2502.11034)."""

    lambda_abs: PositiveFloat = 1.0
    """Cap on the global norm while warming up."""
    lambda_rel: float = Field(default=1.05, ge=1.0)
    """A norm may exceed its average by this factor."""
    beta: float = Field(default=0.98, gt=0.0, lt=1.0)
    """Memory of the averages."""
    warmup_steps: PositiveInt = 100
    """Steps under ``lambda_abs``."""


class SkipStepConfig(Section):
    """A baseline beside ZClip: skip a step whose norm or loss is an outlier of its window (OLMo-core)."""

    rolling_interval_length: int = Field(default=128, ge=2)
    """Steps of the window; it judges from half of them on."""
    sigma_factor: PositiveFloat = 6.0
    """Deviations above the window's mean that skip a step."""
    compat: bool = False
    """Let a loss that is not finite into the window, as OLMo-core does: that step and the next 128 are skipped."""


class PolicyConfig(Section):
    """What is done about a bad step."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A gradient norm that is not finite: skip the step, or end the run. (An fp16 overflow the loss scale can answer is neither.)"""
    max_nonfinite_in_a_row: PositiveInt | None = 8
    """Skipped non-finite steps in a row, one more of which ends the run; ``null``: none does."""
    replay_nonfinite: bool = True
    """Run the first non-finite step again without an update to find the tensor, module, rank and micro-batch it began in."""
    on_spike: Literal["clip", "skip"] = "clip"
    """A norm whose z is above ``zclip.z_thresh``: clip it, or leave out the step (weights, moments, schedule and statistics)."""
    norm_spike: PositiveFloat | None = 6.0
    """Under a rule that keeps no score of the global norm (the fixed cap, ``autoclip``, ``adagc``, a ``scope``): standard score by
    ZClip's statistics above which a norm is written down with who carried it. Nothing else is done; ``null``: none is."""
    loss_spike: PositiveFloat | None = 6.0
    """Robust standard score (median and interquartile range of the last 128 good losses) above which a loss is an outlier; ``null``:
    none is."""
    rewind_after: PositiveInt | None = 8
    """Bad steps in a row (not finite, or a loss outlier; a clipped step is never bad) after which to go back to the last good
    checkpoint and leave out the samples of the bad steps; ``null``: never."""
    max_rewinds: PositiveInt = 3
    """Rewinds without a step beyond the furthest one before them, one more of which ends the run (exit code 86)."""
    snapshots: NonNegativeInt = 0
    """Copies of weights and optimizer to keep in host memory (12 bytes a parameter of a rank's share, with Adam), which a rewind goes back
    to where the newest checkpoint is older; 0: none."""
    snapshot_interval: PositiveInt = 100
    """Steps between them."""


class TVRConfig(Section):
    """Target variance rescaling (arXiv 2503.17500): matrices of the blocks are shrunk to a standard deviation."""

    target_std: PositiveFloat = 0.01
    """Standard deviation a matrix may have."""
    ratio_threshold: float = Field(default=1.0, ge=1.0)
    """Rescale where std / target exceeds it."""
    interval_steps: PositiveInt = 50
    """Applied steps between looks."""
    interval_tokens: PositiveInt | None = None
    """Instead of ``interval_steps``, in tokens, rounded up to steps (trainer only: it knows the tokens of a step)."""
    depth_scaled: bool = False
    """Target divided by sqrt(l) in block l from 1."""
    zero_bias: bool = False
    """Set the bias of a rescaled matrix to 0, as the released code does."""
    two_sided: bool = False
    """Also inflate matrices below target / ratio_threshold."""
    targets: dict[Literal["q", "k", "v", "o", "gate", "up", "down"], PositiveFloat] = Field(default={})
    """Other targets by role."""
    exclude: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = Field(default=[])
    """Roles left alone."""

    @model_validator(mode="after")
    def _one_interval(self) -> TVRConfig:
        default = type(self).model_fields["interval_steps"].default
        if self.interval_tokens is not None and self.interval_steps != default:
            raise ValueError(
                f"interval_steps = {self.interval_steps} and interval_tokens = {self.interval_tokens} are both given: leave "
                f"interval_steps at {default}, or set interval_tokens to null"
            )
        return self


class QKClipConfig(Section):
    """QK-clip (MuonClip, arXiv 2507.20534): queries' and keys' weights of a head whose largest logit is above a threshold are shrunk."""

    threshold: PositiveFloat = 100.0
    """Largest logit q.k / sqrt(head width) a head may reach in a step."""
    balance: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the factor's logarithm the queries take; the keys take the rest."""


class StabilityConfig(Section):
    """What keeps the run stable; each method is off at ``null``, and at most one clips."""

    zclip: ZClipConfig | None = None
    """Adaptive clipping; ``{}`` for the defaults."""
    autoclip: AutoClipConfig | None = None
    """Instead of ZClip."""
    adagc: AdaGCConfig | None = None
    """Instead of ZClip."""
    skip_step: SkipStepConfig | None = None
    """Instead of ZClip."""
    tvr: TVRConfig | None = None
    """Variance rescaling; ``{}`` for the defaults."""
    qk_clip: QKClipConfig | None = None
    """Clipping of attention's logits through the weights; ``{}`` for the defaults."""
    policy: PolicyConfig = PolicyConfig()
    """Bad steps."""

    @property
    def clipping(self) -> str | None:
        """Key of the adaptive method that clips; None for the fixed cap alone."""
        return next((key for key in CLIPPING if getattr(self, key) is not None), None)

    @model_validator(mode="after")
    def _one_clips(self) -> StabilityConfig:
        given = [key for key in CLIPPING if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: one decides about a norm, set the others to null")
        if self.policy.on_spike == "skip" and (self.zclip is None or self.zclip.scope != "global"):
            raise ValueError("policy.on_spike = skip needs zclip with scope global: its z says what a spike is")
        return self
