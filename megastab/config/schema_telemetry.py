"""What the ``megastab.telemetry`` section of the JSON may say: how often the inside of the model is looked at, and what of it."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from megastab.config.section import Section


class StragglerConfig(Section):
    """Naming a rank that is slower than its peers, the ranks of its pipeline stage. All ranks take a step together; a rank's own time is
    what is left of it when the time it stands in collectives is taken off. One small all-gather every ``steps`` steps, none between."""

    steps: int = Field(default=50, ge=3)
    """Steps whose median is compared; a rank that was slow in fewer than half of them is not named."""
    over: PositiveFloat = 0.2
    """A rank is slow from this share above the median of its peers on (0.2: 20 %), and no longer below half of it."""


class TelemetryConfig(Section):
    """A look inside the model on the first step and every ``interval_steps``; nothing is added to the other steps. A look costs a few
    percent of its step, so that one in a hundred is nearly free, and what forms between looks is seen while it can still be acted on.
    Beside it, and on every step: which rank is slow."""

    interval_steps: PositiveInt | None = 100
    """Steps between looks; ``null``: none."""
    activations: bool = True
    """Largest entries, RMS, median and kurtosis of the residual stream, attention's and the MLP's output in every block; the first
    micro-batch of the step. Whether an activation is massive."""
    attention: bool = True
    """Largest logit, entropy, and the mass on the first key and on the sink of every head; 64 queries of the step's first sample."""
    weights: bool = True
    """Mean and std, update-to-weight ratio and gradient norm of every matrix."""
    straggler: StragglerConfig | None = StragglerConfig()
    """Names a rank that is slower than its peers; ``null``: nothing is counted."""

    def samples(self, step: int) -> bool:
        """Whether step number ``step`` (from 1) is looked at."""
        every = self.interval_steps
        return every is not None and (self.activations or self.attention or self.weights) and (step == 1 or step % every == 0)
