"""Figures of the stability core's own cost: ``ZClip.observe``, our functions in a step, and TVR beside the fused AdamW step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from megastab.report.bench.cases import Options, Spec
from megastab.report.bench.jobs import Job, Reply
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Series, take_turns

OBSERVE_BOUND, HOST_BOUND = 5.0, 50.0  # microseconds
FIRES_BOUND, LOOKS_BOUND = 1.2, 0.7  # over AdamW
SHARE_BOUND = 1.0  # percent of a step
INTERVAL = 50
WARMUP = 5

# What the child times in a round, in the order of its reply; the first three at every model, the rest at model A.
PARTS = ("adamw", "fires", "looks", "step", "host_zclip", "host_fixed", "observe", "observe_spikes")


def stability(options: Options) -> Iterator[Row]:
    """Each part's median over the rounds of one process that takes all parts in turn."""
    for size in options.sizes:
        with Job(Spec("stability", size), options.threads) as job:
            (replies,) = take_turns([job], WARMUP, options.rounds)
        yield from rows(size, by_part(replies))


def by_part(replies: Sequence[Reply]) -> dict[str, Series]:
    """Seconds of each part, round by round."""
    return dict(zip(PARTS, map(list, zip(*(reply.seconds for reply in replies), strict=True)), strict=False))


def rows(size: str, parts: dict[str, Series]) -> Iterator[Row]:
    """The figures of one model."""
    adamw = median(parts["adamw"])
    for name, bound, said in (("fires", FIRES_BOUND, "rescales every matrix"), ("looks", LOOKS_BOUND, "rescales none")):
        ratio = median(parts[name]) / adamw
        pairs = median(a / b for a, b in zip(parts[name], parts["adamw"], strict=True))
        detail = (
            f"{1e3 * median(parts[name]):.2f} ms, AdamW {1e3 * adamw:.2f} ms on the same masters; median of pairwise ratios {pairs:.3f}"
        )
        raw = {"seconds": parts[name], "adamw_seconds": parts["adamw"]}
        yield Row("stability", f"{size} TVR that {said}, over AdamW", ratio, bound=bound, is_floor=False, detail=detail, raw=raw)
    if "step" in parts:
        yield from _of_a_step(size, parts)


def _of_a_step(size: str, parts: dict[str, Series]) -> Iterator[Row]:
    step = median(parts["step"])
    share = 100 * median(parts["fires"]) / INTERVAL / step
    detail = f"a look every {INTERVAL} steps that rescales every matrix; a step is {1e3 * step:.0f} ms"
    yield Row("stability", f"{size} TVR, share of the run", share, "%", SHARE_BOUND, False, detail, {"step_seconds": parts["step"]})
    for name, said in (("host_zclip", "ZClip"), ("host_fixed", "fixed clipping")):
        detail = f"norm_known, step_done, record and judge, within an ordinary step; slowest of the rounds {1e6 * max(parts[name]):.0f} us"
        yield _microseconds(f"our functions in a step, {said}", parts[name], HOST_BOUND, detail)
    for name, said in (("observe", "stationary norms"), ("observe_spikes", "every second one a spike")):
        yield _microseconds(f"ZClip.observe(), {said}", parts[name], OBSERVE_BOUND, "mean of 1000 calls in a row, median over the rounds")


def _microseconds(case: str, seconds: Series, bound: float, detail: str) -> Row:
    return Row("stability", case, 1e6 * median(seconds), "us", bound, False, detail, {"seconds": seconds})
