"""DeepSpeed's pipeline: stages cut by computed costs, and the instructions whose seams we need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule

from megastab.parallel import collectives
from megastab.parallel.partition import stage_bounds
from megastab.wrappers.adapter import Adapter


class StagedModule(PipelineModule):
    """A ``PipelineModule`` whose stage boundaries come from the layers' costs; DeepSpeed's own way builds every layer to count it."""

    def __init__(self, layers: Sequence[Any], costs: Sequence[int], topology: Any, loss_fn: Callable[..., Any]):
        self.costs = list(costs)
        super().__init__(layers=layers, topology=topology, loss_fn=loss_fn, activation_checkpoint_interval=0)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = stage_bounds(self.costs, self.num_stages)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def before_reduction(adapter: Adapter, ready: Callable[[], None]) -> None:
    """Call ``ready()`` once a step, on the boundary, when accumulation is done and nothing is reduced over data-parallel ranks yet."""
    engine = adapter.engine
    if not hasattr(engine, "_INSTRUCTION_MAP"):
        reduce = engine.allreduce_gradients

        def allreduce_gradients(*args: Any, **kwargs: Any) -> None:
            if engine.is_gradient_accumulation_boundary():
                ready()
            reduce(*args, **kwargs)

        engine.allreduce_gradients = allreduce_gradients
        return
    original = engine._INSTRUCTION_MAP[schedule.ReduceGrads]

    def reduce_grads(self: Any) -> None:
        ready()
        original(self)

    engine._INSTRUCTION_MAP = {
        **engine._INSTRUCTION_MAP,
        schedule.ReduceTiedGrads: lambda self: _sum_tied(adapter),
        schedule.ReduceGrads: reduce_grads,
    }


def _sum_tied(adapter: Adapter) -> None:
    """Sum tied weights' gradients over the stages that hold a copy.

    DeepSpeed reads ``.grad``, which is empty where gradients accumulate elsewhere (fp16, offload): its copies then drift apart.
    """
    for weight, group in adapter.engine.module.get_tied_weights_and_groups():
        gradient = adapter.gradient(weight)
        if gradient is not None:
            collectives.sum_(gradient, group)


def running_loss(engine: Any) -> float:
    """On the last stage: mean loss of the step's micro-batches so far, on this data-parallel rank."""
    return float(engine.total_loss) / int(engine.gradient_accumulation_steps())
