"""Figure of dynamic tanh: its forward and backward beside RMSNorm's, eager and compiled."""

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

EAGER_BOUND, COMPILED_BOUND = 1.3, 1.0  # dyt over rmsnorm
TOKENS, WIDTH = 4096, 1024
QUICK_TOKENS = 512
TIMEOUT_SECONDS = 900


def norms(options: Options) -> Iterator[Row]:
    """One dtype at a time, in a process of its own that takes all contestants in turn."""
    tokens = QUICK_TOKENS if options.is_quick else TOKENS
    for dtype in ("fp32", "bf16"):
        yield from rows(f"[{tokens}, {WIDTH}] {dtype}", measured(options.threads, tokens, options.rounds, dtype))


def measured(threads: int, tokens: int, rounds: int, dtype: str) -> dict[str, Series]:
    """Seconds of forward and backward of each contestant, round by round; a compiled one is missing where it cannot be built."""
    command = [sys.executable, "-m", "megastab.report.bench.norms_contestants", *map(str, (tokens, WIDTH, rounds)), dtype]
    try:
        done = subprocess.run(command, env=environment(threads), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"{dtype} took more than {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise Failed(last_words(done.stderr))
    seconds: dict[str, Series] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def rows(case: str, seconds: dict[str, Series]) -> Iterator[Row]:
    """The figures of one dtype."""
    for how, bound in (("eager", EAGER_BOUND), ("compiled", COMPILED_BOUND)):
        said = f"{case} dyt over rmsnorm, {how}"
        if f"dyt {how}" not in seconds:
            yield Row("norms", said, None, bound=bound, is_floor=False, detail="torch.compile does not work here")
            continue
        mine, theirs = seconds[f"dyt {how}"], seconds[f"rmsnorm {how}"]
        pairs = paired_ratio(theirs, mine)
        detail = f"{1e3 * median(mine):.2f} ms, rmsnorm {1e3 * median(theirs):.2f} ms; median of pairwise ratios {pairs:.3f}"
        raw = {"seconds": mine, "rmsnorm_seconds": theirs}
        yield Row("norms", said, median(mine) / median(theirs), bound=bound, is_floor=False, detail=detail, raw=raw)
