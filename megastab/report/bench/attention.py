"""Figures of attention's variants: forward and backward over plain causal SDPA's, 8 samples x 8 heads x 512 positions x 64 channels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from megastab.report.bench.cases import Options
from megastab.report.bench.jobs import Failed, environment, last_words
from megastab.report.bench.rows import Row

BOUNDS: dict[str, float | None] = {
    "softmax1": 1.1,
    "learned": 1.1,
    "kv_bias": 1.25,
    "kv_bias compiled": 1.1,
    "portable softmax1": 1.3,
    "portable learned": 1.3,
    "portable kv_bias": 1.3,
    "capped": None,  # outside the promise: it has no flash kernel
}
BATCH, QUICK_BATCH = 8, 1
MAX_ROUNDS = 15
TIMEOUT_SECONDS = 1200

Pairs = dict[str, list[list[float]]]


def attention(options: Options) -> Iterator[Row]:
    """One precision at a time, in a process of its own that takes all contestants in turn."""
    for dtype in ("bf16", "fp32"):
        yield from rows(dtype, measured(options, dtype))


def measured(options: Options, dtype: str) -> Pairs:
    """Seconds of plain attention and of each contestant after it, round by round."""
    sizes = (QUICK_BATCH if options.is_quick else BATCH, min(options.rounds, MAX_ROUNDS))
    command = [sys.executable, "-m", "megastab.report.bench.attention_contestants", dtype, *map(str, sizes), *BOUNDS]
    try:
        done = subprocess.run(command, env=environment(options.threads), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"{dtype} took more than {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        raise Failed(last_words(done.stderr))
    pairs: Pairs = json.loads(done.stdout.splitlines()[-1])
    return pairs


def rows(dtype: str, pairs: Pairs) -> Iterator[Row]:
    """The figures of one precision: the median of the ratios of neighbouring measurements, which a busy neighbour moves least."""
    for who, taken in pairs.items():
        plain, mine = ([pair[i] for pair in taken] for i in (0, 1))
        ratio = median(b / a for a, b in taken)
        detail = f"{1e3 * median(mine):.1f} ms, plain {1e3 * median(plain):.1f} ms; ratio of medians {median(mine) / median(plain):.3f}"
        raw = {"seconds": mine, "plain_seconds": plain}
        yield Row("attention", f"{dtype} {who} over plain", ratio, bound=BOUNDS[who], is_floor=False, detail=detail, raw=raw)
