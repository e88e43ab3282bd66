"""Looks inside a foreign model: its matrices, on the steps ``megastab.telemetry`` names.

The loop is somebody else's, so a look begins where the step is first known to be one: when its norm is known, before anything is scaled
or updated. Activations and attention are not looked at: what a foreign module gives, and for which tokens, only its author knows.
"""

from __future__ import annotations

from contextlib import ExitStack

from megastab.config.schema_telemetry import TelemetryConfig
from megastab.parallel import collectives
from megastab.stability.controller import Controller
from megastab.telemetry.sampler import Sample, Sampler
from megastab.telemetry.sinks import sample_to_monitor


class WeightLooks:
    """The matrices of an engine's model (collective over the pipeline at construction).

    Args:
        config: on which steps.
        controller: of the engine.
    """

    def __init__(self, config: TelemetryConfig, controller: Controller):
        self._engine = controller.adapter.engine
        of_weights = config.model_copy(update={"activations": False, "attention": False})
        self._sampler = Sampler(of_weights, controller, num_layers=0)
        self._look = ExitStack()
        controller.adapter.on_norm(self._begin, first=True)  # before the sampler's own listener, which must find it looking

    def _begin(self, norm: float) -> None:
        self._look.close()  # of a step that failed after this
        self._look.enter_context(self._sampler.looking(int(self._engine.global_steps) + 1, []))

    def finish(self) -> Sample | None:
        """After the step, on every rank: what was seen, also sent to the monitors the JSON enables; None where it was not sampled."""
        self._look.close()
        sample = self._sampler.finish()
        if sample is not None and collectives.world()[0] == 0:
            sample_to_monitor(self._engine.monitor, sample.step, sample.by_tag())
        return sample
