"""What OrthoAdam costs a run: the trainer's whole step with it, over the same step with AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from megastab.report.bench.cases import SEQ, Options, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Times, paired_ratio, speed_ratio, take_turns, times

TOKENS_A_STEP = 4096
BOUND = 1.05  # at width 512, which is model B
WARMUP = 3  # the first makes the moments


def ortho_step(options: Options) -> Iterator[Row]:
    """Two processes in turn, alike but for the optimizer."""
    size, batch = options.sizes[-1], TOKENS_A_STEP // SEQ
    mine, theirs = Spec("ours", size, batch=batch, optimizer="OrthoAdam"), Spec("ours", size, batch=batch)
    with Job(mine, options.threads) as ortho, Job(theirs, options.threads) as adamw:
        ours, other = (times(replies) for replies in take_turns([ortho, adamw], WARMUP, options.rounds))
    yield row(f"{mine.name}, whole step of {TOKENS_A_STEP} tokens, OrthoAdam over AdamW", ours, other)


def row(case: str, ours: Times, theirs: Times) -> Row:
    """The ratio of the median times."""
    mine, other = median(ours.wall), median(theirs.wall)
    detail = (
        f"{1e3 * mine:.0f} ms, AdamW {1e3 * other:.0f} ms; median of pairwise ratios {paired_ratio(theirs.wall, ours.wall):.3f}, by CPU "
        f"time {speed_ratio(theirs.cpu, ours.cpu):.3f}"
    )
    raw = {"seconds": ours.wall, "cpu_seconds": ours.cpu, "opponent_seconds": theirs.wall, "opponent_cpu_seconds": theirs.cpu}
    return Row("ortho_step", case, mine / other, bound=BOUND, is_floor=False, detail=detail, raw=raw)
