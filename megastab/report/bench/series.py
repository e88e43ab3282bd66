"""Arithmetic on alternating measurements, and taking them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from megastab.report.bench.cases import TOKENS
from megastab.report.bench.jobs import Job, Reply

Series = list[float]


class Times(NamedTuple):
    """Steps of one contestant."""

    wall: Series
    cpu: Series
    """Processor time of all its threads: what a busy neighbour disturbs less."""


def times(replies: Sequence[Reply], contestant: int = 0) -> Times:
    """Those of one contestant in a job."""
    return Times([reply.seconds[contestant] for reply in replies], [reply.cpu_seconds[contestant] for reply in replies])


def take_turns(jobs: Sequence[Job], warmup: int, rounds: int) -> list[list[Reply]]:
    """Replies of each job to ``rounds`` steps taken in turn (A B C A B C ...), after ``warmup`` rounds nobody times.

    A drift of the machine (heat, a neighbour) then reaches all alike, and pairs of one round can be compared.
    """
    for _ in range(warmup):
        for job in jobs:
            job.step()
    taken = [[job.step() for job in jobs] for _ in range(rounds)]
    return [list(replies) for replies in zip(*taken, strict=True)]


def speed_ratio(ours: Series, theirs: Series) -> float:
    """Our speed over theirs by median times: above 1 where we are faster."""
    return median(theirs) / median(ours)


def paired_ratio(ours: Series, theirs: Series) -> float:
    """Median of the ratios round by round: what a drift of the machine cannot move."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def compared(ours: Times, theirs: Times, opponent: str) -> str:
    """Both speeds and the other two ways to form their ratio, in words."""
    mine, other = (TOKENS / median(each.wall) for each in (ours, theirs))
    pairs, cpu = paired_ratio(ours.wall, theirs.wall), speed_ratio(ours.cpu, theirs.cpu)
    return f"{mine:,.0f} tokens/s, {opponent} {other:,.0f}; median of pairwise ratios {pairs:.3f}, by CPU time {cpu:.3f}"
