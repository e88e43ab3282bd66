"""Figures of OrthoAdam's step: the built op and pure torch beside torch's own AdamW, and beside dense rotations of both axes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from megastab.report.bench.cases import Options
from megastab.report.bench.jobs import Failed, environment, last_words
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Series, paired_ratio

OP_BOUND, ODD_BOUND = 1.5, 1.8  # over fused AdamW: widths that are a power of two, widths of m * 2^k
TORCH_BOUND = 3.0  # over foreach AdamW
DENSE_BOUND = 20.0  # times faster than dense
WIDTHS = (512, 1024, 2048, 4096, 768, 2560)
QUICK_WIDTHS = (512, 768)
DENSE_ROWS, DENSE_WIDTH = 4096, 1024
DENSE_ROUNDS = 3
MAX_ROUNDS = 15
TIMEOUT_SECONDS = 1200


def orthoadam(options: Options) -> Iterator[Row]:
    """One width at a time, in a process of its own that takes all contestants in turn."""
    rounds = min(options.rounds, MAX_ROUNDS)
    for width in QUICK_WIDTHS if options.is_quick else WIDTHS:
        yield from rows(width, measured(options.threads, 4 * width, width, rounds, "fused", "foreach", "op", "torch"))
    if not options.is_quick:
        yield from dense_rows(measured(options.threads, DENSE_ROWS, DENSE_WIDTH, DENSE_ROUNDS, "dense", "op", "torch"))


def measured(threads: int, num_rows: int, width: int, rounds: int, *who: str) -> dict[str, Series]:
    """Seconds of a step of each, round by round; ``op`` is missing where it cannot be built."""
    command = [sys.executable, "-m", "megastab.report.bench.orthoadam_contestants", *map(str, (num_rows, width, rounds)), *who]
    try:
        done = subprocess.run(command, env=environment(threads), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"[{num_rows}, {width}] took more than {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise Failed(last_words(done.stderr))
    seconds: dict[str, Series] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def rows(width: int, seconds: dict[str, Series]) -> Iterator[Row]:
    """The figures of one width."""
    is_power = width & (width - 1) == 0
    yield _over("op", "fused", width, seconds, OP_BOUND if is_power else ODD_BOUND)
    yield _over("op", "foreach", width, seconds, 1.0)
    yield _over("torch", "foreach", width, seconds, TORCH_BOUND)


def _over(mine: str, theirs: str, width: int, seconds: dict[str, Series], bound: float) -> Row:
    case = f"[{4 * width}, {width}] {mine} over {theirs} AdamW"
    if mine not in seconds:
        return Row("orthoadam", case, None, bound=bound, is_floor=False, detail="the op cannot be built here")
    a, b = seconds[mine], seconds[theirs]
    detail = f"{1e3 * median(a):.2f} ms, AdamW {1e3 * median(b):.2f} ms; median of pairwise ratios {paired_ratio(b, a):.3f}"
    raw = {"seconds": a, "adamw_seconds": b}
    return Row("orthoadam", case, median(a) / median(b), bound=bound, is_floor=False, detail=detail, raw=raw)


def dense_rows(seconds: dict[str, Series]) -> Iterator[Row]:
    """Against dense Haar matrices on both axes."""
    for mine, bound in (("op", DENSE_BOUND), ("torch", None)):
        case = f"[{DENSE_ROWS}, {DENSE_WIDTH}] {mine}, times faster than dense Haar on both axes"
        if mine not in seconds:
            yield Row("orthoadam", case, None, bound=bound, detail="the op cannot be built here")
            continue
        a, b = seconds[mine], seconds["dense"]
        detail = f"{1e3 * median(a):.1f} ms, dense {1e3 * median(b):.0f} ms"
        yield Row("orthoadam", case, median(b) / median(a), bound=bound, detail=detail, raw={"seconds": a, "dense_seconds": b})
