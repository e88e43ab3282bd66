"""Figures of activation offload: memory a step adds at its peak, and the step's time, with it over without it, side by side."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

from megastab.report.bench.cases import SEQ, Options, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Times, paired_ratio, speed_ratio, take_turns, times

MEMORY_BOUND, TIME_BOUND = 0.6, 1.05
WARMUP, ROUNDS = 3, 9  # the first steps measure the disk, and what goes out follows
FOLDER = "MEGASTAB_BENCH_FOLDER"


def offload(options: Options) -> Iterator[Row]:
    """The same model three times: in place; on the disk as far as the bandwidth goes; all of it on the disk. A GPU adds host memory."""
    size = "A" if options.is_quick else "deep"
    with tempfile.TemporaryDirectory(dir=os.environ.get(FOLDER)) as folder:
        kinds: dict[str, dict[str, Any] | None] = {
            "in place": None,
            "ssd, measured": {"kind": "ssd", "folder": folder},
            "ssd, all": {"kind": "ssd", "folder": folder, "amount": "all"},
        }
        if os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
            kinds["cpu, measured"] = {"kind": "cpu"}
        specs = [Spec("offload", size, activations=section) for section in kinds.values()]
        with ExitStack() as stack:
            jobs = [stack.enter_context(Job(spec, options.threads)) for spec in specs]
            taken = [times(replies) for replies in take_turns(jobs, WARMUP, min(options.rounds, ROUNDS))]
            facts = [job.facts() for job in jobs]
    case = f"{size} bf16, {specs[0].batch * SEQ} tokens"
    for name, seen, known in zip(list(kinds)[1:], taken[1:], facts[1:], strict=True):
        yield from rows(f"{case}, {name}", (seen, known), (taken[0], facts[0]))


def rows(case: str, mine: tuple[Times, dict[str, float]], plain: tuple[Times, dict[str, float]]) -> Iterator[Row]:
    """Memory and time of one way."""
    (ours, known), (theirs, without) = mine, plain
    out, back = known["out_rate"] / 1e9, known["in_rate"] / 1e9
    detail = (
        f"{known['grown'] / 1e6:,.0f} MB at the peak of a step, {without['grown'] / 1e6:,.0f} in place; out at {out:.2f} GB/s, back at "
        f"{back:.2f}; of what might go {_share(known):.0%} was written, {_share(known, 'forwarded'):.0%} taken back on its way; "
        f"waited {known['waited_seconds']:.2f} s for it in all steps"
    )
    raw = {"bytes": [known["grown"], without["grown"]], "rates": [known["out_rate"], known["in_rate"]]}
    ratio = known["grown"] / without["grown"]
    yield Row("offload", f"{case}: peak of a step", ratio, bound=MEMORY_BOUND, is_floor=False, detail=detail, raw=raw)
    wall, other = median(ours.wall), median(theirs.wall)
    detail = (
        f"{1e3 * wall:,.0f} ms, in place {1e3 * other:,.0f}; median of pairwise ratios {paired_ratio(theirs.wall, ours.wall):.3f}, by CPU "
        f"time {1 / speed_ratio(ours.cpu, theirs.cpu):.3f}"
    )
    raw = {"seconds": ours.wall, "cpu_seconds": ours.cpu, "plain_seconds": theirs.wall, "plain_cpu_seconds": theirs.cpu}
    yield Row("offload", f"{case}: step", wall / other, bound=TIME_BOUND, is_floor=False, detail=detail, raw=raw)


def _share(known: dict[str, float], what: str = "written") -> float:
    offered = known["written"] + known["forwarded"] + known["kept"]
    return known[what] / offered if offered else 0.0
