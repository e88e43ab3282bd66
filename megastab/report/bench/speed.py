"""Figures made of alternating steps: ``single``, ``trainer``, ``tp2`` and ``wrappers``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from statistics import median

from megastab.report.bench.cases import Options, Precision, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import Times, compared, speed_ratio, take_turns, times

SPEED_BOUND = {"A": 0.95, "B": 0.90}
MEMORY_BOUND = 1.1
TRAINER_BOUND = 1.0
TP2_BOUND = 0.7
WARMUP = 5  # the first compiles, allocates and creates the optimizer's state; the others settle


def _speed(figure: str, case: str, ours: Times, theirs: Times, opponent: str, bound: float | None = None, note: str = "") -> Row:
    raw = {"seconds": ours.wall, "cpu_seconds": ours.cpu, "opponent_seconds": theirs.wall, "opponent_cpu_seconds": theirs.cpu}
    return Row(figure, case, speed_ratio(ours.wall, theirs.wall), bound=bound, detail=compared(ours, theirs, opponent) + note, raw=raw)


def single(options: Options) -> Iterator[Row]:
    """Our step over the bare loop's, in one process."""
    precisions: tuple[Precision, ...] = ("bf16",) if options.is_quick else ("bf16", "fp32")
    for precision in precisions:
        for size in options.sizes:
            for is_compiled in (False, True):
                yield _beside_bare(Spec("both", size, precision, is_compiled), options)


def memory(options: Options) -> Iterator[Row]:
    """Peak memory over the bare loop's, each alone in a process."""
    for size in options.sizes:
        yield _memory(size, options)


def _beside_bare(spec: Spec, options: Options) -> Row:
    with Job(spec, options.threads) as job:
        (replies,) = take_turns([job], WARMUP, options.rounds)
    apart = max(abs(a / b - 1) for a, b in (reply.losses for reply in replies))
    bound = SPEED_BOUND[spec.size] if spec.precision == "bf16" else None
    return _speed("single", spec.name, times(replies), times(replies, 1), "bare", bound, f"; losses within {apart:.0e}")


def _memory(size: str, options: Options) -> Row:
    grown = []
    for spec in (Spec("ours", size), Spec("bare", size)):
        with Job(spec, options.threads) as job:
            for _ in range(WARMUP):
                job.step()
            grown.append(job.grown_bytes())
    detail = f"ours grew by {grown[0] / 1e6:,.0f} MB from before the model to the peak of {WARMUP} steps, bare by {grown[1] / 1e6:,.0f} MB"
    ratio = grown[0] / grown[1]
    return Row("memory", f"{size} bf16 peak", ratio, bound=MEMORY_BOUND, is_floor=False, detail=detail, raw={"bytes": grown})


def trainer(options: Options) -> Iterator[Row]:
    """Our step over that of Hugging Face's Trainer."""
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        yield Row("trainer", "all", None, detail=f"{' and '.join(missing)} not installed: pip install -e '.[bench]'")
        return
    for size in options.sizes:
        spec = Spec("ours", size)
        with Job(spec, options.threads) as mine, Job(Spec("hugging_face", size), options.threads) as theirs:
            ours, other = (times(replies) for replies in take_turns([mine, theirs], WARMUP, options.rounds))
        yield _speed("trainer", spec.name, ours, other, "Trainer", TRAINER_BOUND)


def tp2(options: Options) -> Iterator[Row]:
    """Two tensor-parallel ranks of half the threads each, over one process with all of them; and where the rest goes."""
    size, half = options.sizes[-1], max(1, options.threads // 2)
    spec = Spec("ours", size, tensor=2)
    with Job(spec, half, ranks=2) as two, Job(Spec("ours", size), 2 * half) as one:
        cut, whole = take_turns([two, one], WARMUP, options.rounds)
    alone, ours = times(whole).wall, times(cut)
    both_ranks = Times(ours.wall, [2 * seconds for seconds in ours.cpu])
    yield _speed("tp2", f"{spec.name} {half}+{half} threads", both_ranks, times(whole), "one process", TP2_BOUND)
    pairs = [(reply.communicating, reply.seconds[0]) for reply in cut]
    share = 100 * median(sent / step for sent, step in pairs)
    yield Row("tp2", "share of the step in collectives", share, "%", detail="starting them and waiting for them, rank 0")
    rest = median(step - sent for sent, step in pairs) / median(alone)
    yield Row("tp2", "the rest, over one process's step", rest, detail="above 1: smaller products, work both ranks do, overlapped traffic")


def wrappers(options: Options) -> Iterator[Row]:
    """DeepSpeed's optimizer wrappers on one process, relative to the bare loop: the table users choose by."""
    for size in options.sizes:
        specs = [Spec("bare", size), *(Spec("ours", size, zero_stage=stage) for stage in (1, 2, 3))]
        with ExitStack() as stack:
            jobs = [stack.enter_context(Job(spec, options.threads)) for spec in specs]
            bare, *staged = (times(replies) for replies in take_turns(jobs, WARMUP, options.rounds))
        for spec, ours in zip(specs[1:], staged, strict=True):
            yield _speed("wrappers", f"{spec.name} ZeRO {spec.zero_stage}", ours, bare, "bare")
