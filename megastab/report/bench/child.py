"""Child side: build the contestant of one :class:`Spec`, then take a step per request until the parent closes the pipe."""

from __future__ import annotations

import resource
import sys

from megastab.report.bench.cases import Spec
from megastab.report.bench.turns import Turns


def resident_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class MemoryGrowth:
    """Peak memory since this object was made, which is after all imports and before the model.

    On the CPU: the largest resident size of the process's life less the resident size now. Imports peak below any model measured
    here. On an accelerator: the allocator's peak.
    """

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        self.accelerator = get_accelerator()
        self.before = resident_bytes()

    def __call__(self) -> float:
        """Bytes."""
        if self.accelerator.device_name() == "cpu":
            return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before)
        return float(self.accelerator.max_memory_allocated())


def main(text: str) -> None:
    """Run one contestant."""
    spec, turns = Spec.parse(text), Turns()
    if spec.who == "hugging_face":
        from megastab.report.bench.hugging_face import run

        run(spec, turns)
        return
    from megastab.engine.launch import start_job
    from megastab.parallel import collectives
    from megastab.report.bench.contestants import Contestants
    from megastab.report.bench.offload_contestants import OffloadContestants
    from megastab.report.bench.stability_contestants import StabilityContestants

    start_job()
    memory = MemoryGrowth()
    if spec.who == "offload":
        contestant = OffloadContestants(spec)
        turns.serve(contestant.step, contestant.facts)
        collectives.leave()
        return
    step = StabilityContestants(spec).step if spec.who == "stability" else Contestants(spec).step
    turns.serve(step, memory)
    collectives.leave()


if __name__ == "__main__":
    main(sys.argv[1])
