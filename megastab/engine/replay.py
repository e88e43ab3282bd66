"""The first bad step once more: the same samples with hooks on and no update, to say where it went wrong and whether it does so again.

A step is a function of weights and samples (dropout included), so what comes from them comes again; what does not was made by a machine.
Compiled code runs eagerly meanwhile, or its inner hooks would not fire: a fault of the compiled form alone does not repeat either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megastab.data.batches import MicroBatch
from megastab.engine.finite_watch import Sighting, Watch, What
from megastab.engine.train_step import Stepper
from megastab.model.eager import eagerly
from megastab.parallel import collectives
from megastab.stability.controller import Controller
from megastab.wrappers.counters import untouched


@dataclass(frozen=True)
class ReplayFinding:
    """Where a replayed step first went wrong, equal on every rank."""

    repeats: bool
    """Whether the norm was not finite again: then the cause is the data or the weights, otherwise a machine."""
    norm: float
    """Global gradient norm of the replay; inf when some gradient was not finite."""
    what: What | Literal["none"] = "none"
    """Kind of the first tensor that was not finite; ``none`` where no rank saw one."""
    name: str = ""
    """Canonical name of the matrix (weights and gradients) or module, layers numbered over all stages."""
    module: str = ""
    """Class of the module."""
    rank: int | None = None
    """Lowest rank that saw it."""
    stage: int | None = None
    micro_batch: int | None = None
    """Which of that rank's micro-batches, from 0; None for a weight."""
    num_nonfinite: int = 0
    num_nan: int = 0
    num_elements: int = 0
    ranks_hit: tuple[int, ...] = ()
    """All ranks that saw it at this very place: several where tensor-parallel ranks sum at once or replicas share the cause."""
    samples: tuple[int, ...] = ()
    """Global ids of that micro-batch's samples."""

    def describe(self) -> str:
        """One line an engineer can act on."""
        if self.what == "none" and self.repeats:
            return (
                "repeats: the gradient norm is not finite, yet every weight, activation and gradient on every rank is: it overflows where "
                "gradients are summed, in the reduction over ranks or in the sum of squares; look for gradients that are huge"
            )
        if self.what == "none":
            return (
                f"did not repeat (norm {self.norm:.6g} from the same weights and samples): suspect a machine, not the data; nothing is "
                "left of the fault to tell its rank, so look through the hardware logs of all of them"
            )
        if not self.repeats:
            return (
                f"did not repeat (norm {self.norm:.6g} from the same weights and samples): suspect the machine of rank {self.rank}, where "
                f"the replay met {self._where()} that reached no gradient"
            )
        return f"repeats: {self._where()}; {self._advice()}"

    def _where(self) -> str:
        tensor = {
            "weight": f"weight {self.name}",
            "master weight": f"the fp32 master of {self.name}",
            "input": f"the input of {self.name}",
            "output": f"the output of {self.name}",
            "gradient of output": f"the gradient of the output of {self.name}",
            "gradient": f"the gradient of {self.name}",
        }[self.what]
        micro_batch = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        also = f" (with ranks {', '.join(map(str, self.ranks_hit[1:]))})" if len(self.ranks_hit) > 1 else ""
        return (
            f"{tensor} ({self.module}, rank {self.rank}{also}, stage {self.stage}{micro_batch}) with {self.num_nonfinite} of "
            f"{self.num_elements} entries not finite ({self.num_nan} nan)"
        )

    def _advice(self) -> str:
        samples = f"samples {', '.join(map(str, self.samples))}"
        return {
            "weight": "every step fails until it is replaced: go back to a checkpoint",
            "master weight": "every step fails until it is replaced: go back to a checkpoint",
            "input": f"all outputs before it are finite, so the code that calls the module made it; {samples}",
            "output": f"its inputs and all weights are finite, so it overflows inside, or a sum over ranks does; {samples}",
            "gradient of output": f"forward and all gradients after it are finite, so the backward of what uses it overflows; {samples}",
            "gradient": f"forward and the gradients before it are finite, so its own product or sum overflows; {samples}",
        }[self.what]

    def facts(self) -> dict[str, Any]:
        """Plain values for an ``Event``; the norm as ``replay_norm``, because an event's own is the bad step's."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items() if key != "norm"}
        return {**plain, "replay_norm": self.norm}


def replay(engine: Any, stepper: Stepper, controller: Controller, batches: Sequence[MicroBatch]) -> ReplayFinding:
    """Take the step of ``batches`` again without an update and say where it is first not finite (collective over the job).

    It takes the time of a step or two and leaves no trace: weights, masters, moments, schedule, loss scale, counters and generators are
    as before. After an error in it so are hooks and counters, but not the gradients it had begun to sum. Call it after the bad step
    with the very batches of that step, before the next one. Not for an overflow the fp16 loss scale answers: the scale has fallen
    since, so the replay would be another step.

    Args:
        engine: the engine ``stepper`` drives.
        stepper: runs the micro-batches.
        controller: the engine's; its statistics are left alone.
        batches: this rank's micro-batches of the bad step.

    Returns:
        The same finding on every rank.
    """
    watch = Watch(controller.adapter, controller.grid.pp.rank)
    watch.look_at_weights()
    with untouched(engine), eagerly(), controller.rehearsal() as norms, watch:
        stepper.train(batches)
    (norm,) = norms
    mine = watch.first
    samples = () if mine is None or mine.micro_batch is None else tuple(batches[mine.micro_batch].sample_ids.tolist())
    return _first_of(norm, collectives.gather_objects((mine, samples)))  # over all ranks: any of them may have seen it first


def _first_of(norm: float, seen: Sequence[tuple[Sighting | None, tuple[int, ...]]]) -> ReplayFinding:
    """The earliest of all ranks' sightings."""
    repeats = not math.isfinite(norm)
    met = [(sighting, samples) for sighting, samples in seen if sighting is not None]
    if not met:
        return ReplayFinding(repeats, norm)
    first, samples = min(met)
    return ReplayFinding(
        repeats,
        norm,
        what=first.what,
        name=first.name,
        module=first.module,
        rank=first.rank,
        stage=first.stage,
        micro_batch=first.micro_batch,
        num_nonfinite=first.num_nonfinite,
        num_nan=first.num_nan,
        num_elements=first.num_elements,
        ranks_hit=tuple(sighting.rank for sighting, _ in met if sighting.place == first.place),
        samples=samples,
    )
