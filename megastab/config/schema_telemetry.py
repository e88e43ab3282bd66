"""What the ``megastab.telemetry`` section of the JSON may say: how often the inside of the model is looked at, and what of it."""

from __future__ import annotations

from pydantic import PositiveInt

from megastab.config.section import Section


class TelemetryConfig(Section):
    """A look inside the model on the first step and every ``interval_steps``; nothing is added to the other steps. A look costs a few
    percent of its step, so that one in a hundred is nearly free, and what forms between looks is seen while it can still be acted on."""

    interval_steps: PositiveInt | None = 100
    """Steps between looks; ``null``: none."""
    activations: bool = True
    """Largest entries, RMS, median and kurtosis of the residual stream, attention's and the MLP's output in every block; the first
    micro-batch of the step. Whether an activation is massive."""
    attention: bool = True
    """Largest logit, entropy, and the mass on the first key and on the sink of every head; 64 queries of the step's first sample."""
    weights: bool = True
    """Mean and std, update-to-weight ratio and gradient norm of every matrix."""

    def samples(self, step: int) -> bool:
        """Whether step number ``step`` (from 1) is looked at."""
        every = self.interval_steps
        return every is not None and (self.activations or self.attention or self.weights) and (step == 1 or step % every == 0)
