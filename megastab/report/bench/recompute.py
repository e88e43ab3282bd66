"""Figures of recompute: what a step adds at its peak under each policy, over what the planner says, and the step's time over ``none``'s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from typing import get_args

from megastab.config.load import load_config
from megastab.config.schema import Recompute
from megastab.plan.plan import plan
from megastab.plan.policies import Policy
from megastab.report.bench.cases import SEQ, Options, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Times, paired_ratio, speed_ratio, take_turns, times

WARMUP, ROUNDS = 2, 9


def recompute(options: Options) -> Iterator[Row]:
    """One model under each policy, steps in turn."""
    size = "A" if options.is_quick else "deep"
    specs = [Spec("offload", size, recompute=name) for name in get_args(Recompute)]
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(spec, options.threads)) for spec in specs]
        taken = [times(replies) for replies in take_turns(jobs, WARMUP, min(options.rounds, ROUNDS))]
        grown = [job.facts()["grown"] for job in jobs]
    planned = plan(load_config(specs[0].source(), world_size=1)).policies
    yield from rows(f"{size} bf16, {specs[0].batch * SEQ} tokens", planned, grown, taken)


def rows(case: str, planned: Sequence[Policy], grown: Sequence[float], taken: Sequence[Times]) -> Iterator[Row]:
    """Memory and time of each policy."""
    plain = taken[0]
    for policy, bytes_, ours in zip(planned, grown, taken, strict=True):
        detail = f"{bytes_ / 1e6:,.0f} MB at the peak of a step, {policy.peak / 1e6:,.0f} planned"
        raw = {"bytes": [bytes_, float(policy.peak)]}
        yield Row("recompute", f"{case}, {policy.name}: peak over planned", bytes_ / policy.peak, detail=detail, raw=raw)
        detail = (
            f"{1e3 * median(ours.wall):,.0f} ms; median of pairwise ratios {paired_ratio(plain.wall, ours.wall):.3f}, by CPU time "
            f"{1 / speed_ratio(ours.cpu, plain.cpu):.3f}; planned {1 + policy.more_compute:.3f} in FLOPs"
        )
        raw = {"seconds": ours.wall, "cpu_seconds": ours.cpu}
        yield Row("recompute", f"{case}, {policy.name}: step over none's", median(ours.wall) / median(plain.wall), detail=detail, raw=raw)
