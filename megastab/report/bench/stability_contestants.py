"""Child side of the figure ``stability``: one round times every part once, in turn, in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from megastab.parallel.param_info import ParamInfo, Part
from megastab.report.bench.cases import SIZES, Spec
from megastab.report.bench.contestants import Ours, random_batches
from megastab.stability.controller import Controller
from megastab.stability.tvr import TVR
from megastab.stability.zclip import ZClip
from megastab.wrappers.adapter import Adapter

HOST_FUNCTIONS = ("norm_known", "step_done", "record", "judge")
WHOLE_STEP_SIZE = "A"  # the model whose whole step is taken too
NUM_CALLS = 1000  # of observe in a round
SPREAD = 0.1  # of the logarithm of a norm
NEVER_STEPS = 1 << 30


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Beside:
    """TVR and a fused AdamW on the very same fp32 masters: those of the matrices TVR looks at."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        catalogue = [(info, part) for info in map(adapter.info, adapter.parameters()) for part in info.parts]
        self.matrices: list[tuple[ParamInfo, Part]] = TVR().selected(catalogue)
        names = {part.name for _, part in self.matrices}
        masters: list[Tensor] = [f.master.detach().requires_grad_() for f in adapter.fragments() if f.part.name in names]
        for master in masters:
            master.grad = torch.randn_like(master)
        self.adamw = torch.optim.AdamW(masters, lr=1e-6, weight_decay=0.1, fused=True)
        # Far from the weights' std in turn, on either side: every matrix fires each time, and the weights stay of one size.
        self.firing = cycle([TVR(target_std=0.01, two_sided=True), TVR(target_std=0.02, two_sided=True)])
        self.looking = TVR(target_std=1e6)

    def seconds(self) -> list[float]:
        """AdamW, a firing that rescales everything, a look that rescales nothing; each of these right after an update, as in a step."""
        first = seconds_of(self.adamw.step)
        fires = self._tvr_seconds(next(self.firing), len(self.matrices))
        second = seconds_of(self.adamw.step)
        return [(first + second) / 2, fires, self._tvr_seconds(self.looking, 0)]

    def _tvr_seconds(self, tvr: TVR, wanted: int) -> float:
        began = time.perf_counter()
        events = tvr.rescale_fragments_(list(self.adapter.fragments()), self.matrices, None, True)
        seconds = time.perf_counter() - began
        assert len(events) == wanted, f"{len(events)} of {len(self.matrices)} matrices were rescaled, {wanted} should be"
        return seconds


class HostClock:
    """Adds up the time inside the controller's functions, in every controller made after this one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in HOST_FUNCTIONS:
            setattr(Controller, name, self._timed(getattr(Controller, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return run

    def taken(self) -> float:
        """Seconds since the last call of this."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Observed:
    """A warm ZClip with its defaults, fed with norms drawn beforehand; every ``spike_every``-th is ten times as large."""

    def __init__(self, spike_every: int = NUM_CALLS):
        draw = random.Random(0)
        self.zclip = ZClip()
        for _ in range(self.zclip.warmup_steps):
            self.zclip.observe(draw.lognormvariate(0.0, SPREAD))
        factors = [10.0 if i % spike_every == spike_every - 1 else 1.0 for i in range(NUM_CALLS)]
        self.norms = [factor * draw.lognormvariate(0.0, SPREAD) for factor in factors]

    def seconds(self) -> float:
        """Mean of a call."""
        observe, norms = self.zclip.observe, self.norms
        began = time.perf_counter()
        for norm in norms:
            observe(norm)
        return (time.perf_counter() - began) / NUM_CALLS


class StabilityContestants:
    """What :data:`megastab.report.bench.stability.PARTS` names, of one process."""

    def __init__(self, spec: Spec):
        self.clock = HostClock()
        # Judged from the third step on, and never a spike: a step that stands out also looks for who carried its norm.
        zclip = {"warmup_steps": 2, "z_thresh": 1e9}
        self.engines = [self._engine(spec, {"zclip": zclip, "tvr": {"interval_steps": NEVER_STEPS}})]
        self.beside = Beside(self.engines[0].built.adapter)
        self.is_whole = spec.size == WHOLE_STEP_SIZE
        if self.is_whole:
            self.engines.append(self._engine(spec, {}))
            self.batches = cycle(random_batches(SIZES[spec.size]["vocab_size"]))
            self.observed = [Observed(), Observed(spike_every=2)]  # every second one: more would restart the statistics
            self.num_taken = 0

    def _engine(self, spec: Spec, stability: dict[str, Any]) -> Ours:
        source = spec.source()
        if "zclip" in stability:
            source["gradient_clipping"] = 0.0  # a cap below the usual norm would leave it nothing to do
        source["megastab"]["stability"] = stability
        return Ours(source)

    def step(self) -> dict[str, Any]:
        """One round."""
        seconds = self.beside.seconds()
        if self.is_whole:
            steps, hosts = zip(*(self._whole(engine) for engine in self.engines), strict=True)
            seconds += [steps[0], *hosts, *(observed.seconds() for observed in self.observed)]
        return {"seconds": seconds}

    def _whole(self, engine: Ours) -> tuple[float, float]:
        """A training step as the trainer takes it: its seconds, and those of our functions in it."""
        batch, controller = next(self.batches), engine.built.controller
        self.num_taken += 1
        began = time.perf_counter()
        loss = engine.step(batch)
        controller.step_done()
        controller.record(step=self.num_taken, loss=loss, lr=0.0, tokens=batch.tokens.numel(), seconds=0.0)
        controller.judge(self.num_taken, loss)
        return time.perf_counter() - began, self.clock.taken()
