"""Figures of activation checkpointing: memory a step adds at its peak, and its time, under each policy over keeping everything; beside
each what the planner says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

from megastab.config.load import load_config
from megastab.plan.parameters import stages
from megastab.plan.recompute import RECOMPUTES, Policy, policies
from megastab.report.bench.cases import SEQ, Options, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Times, paired_ratio, speed_ratio, take_turns, times

WARMUP, ROUNDS = 2, 9
Seen = tuple[Times, dict[str, Any]]


def recompute(options: Options) -> Iterator[Row]:
    """The same model under none, selective and full, in turn."""
    size = "A" if options.is_quick else "deep"
    specs = [Spec("offload", size, recompute=policy) for policy in RECOMPUTES]
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(spec, options.threads)) for spec in specs]
        taken = [times(replies) for replies in take_turns(jobs, WARMUP, min(options.rounds, ROUNDS))]
        facts = [job.facts() for job in jobs]
    config = load_config(specs[0].source(), world_size=1)
    planned = policies(config, stages(config.megastab.model, config.layout))
    case = f"{size} bf16, {specs[0].batch * SEQ} tokens"
    for policy, seen, known in zip(planned[1:], taken[1:], facts[1:], strict=True):
        yield from rows(case, (policy, planned[0]), (seen, known), (taken[0], facts[0]))


def rows(case: str, planned: tuple[Policy, Policy], mine: Seen, plain: Seen) -> Iterator[Row]:
    """Memory and time of one policy."""
    (policy, none), (ours, known), (theirs, without) = planned, mine, plain
    name = f"{case}, {policy.recompute}"
    detail = (
        f"planned {policy.activations / none.activations:.3f}; {known['grown'] / 1e6:,.0f} MB at the peak of a step, planned "
        f"{policy.activations / 1e6:,.0f}; without {without['grown'] / 1e6:,.0f} MB, planned {none.activations / 1e6:,.0f}"
    )
    raw = {"bytes": [known["grown"], without["grown"]], "planned_bytes": [policy.activations, none.activations]}
    yield Row("recompute", f"{name}: peak of a step", known["grown"] / without["grown"], detail=detail, raw=raw)
    wall, other = median(ours.wall), median(theirs.wall)
    detail = (
        f"planned {policy.products:.3f} by products alone; {1e3 * wall:,.0f} ms, without {1e3 * other:,.0f}; median of pairwise ratios "
        f"{paired_ratio(theirs.wall, ours.wall):.3f}, by CPU time {1 / speed_ratio(ours.cpu, theirs.cpu):.3f}"
    )
    raw = {"seconds": ours.wall, "cpu_seconds": ours.cpu, "plain_seconds": theirs.wall, "plain_cpu_seconds": theirs.cpu}
    yield Row("recompute", f"{name}: step", wall / other, detail=detail, raw=raw)
