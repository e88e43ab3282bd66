"""Text files to Megatron ``.bin/.idx``: several processes, one output whatever their number.

Workers turn units of input into shards (``shards.py``); the parent appends finished shards in the order of the input while the
others still work, so that little extra space is needed. Everything is made in a temporary folder beside the output and renamed
at the end, the index last: a dataset with an index is whole.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megastab.config.errors import UserError
from megastab.data.documents import Unit, plan_units
from megastab.data.index_file import token_dtype, write_index
from megastab.data.shards import Job, Shard, UnitReport, run_unit, start_worker, tokenize_unit
from megastab.data.sidecar import Sidecar, bits_per_byte
from megastab.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    workers: int = 1,
    valid_fraction: float = 0.0,
    key: str = "text",
    append_eod: bool = True,
    *,
    unit_bytes: int | None = None,
    progress: bool = True,
) -> dict[str, Sidecar]:
    """Tokenize ``inputs`` into ``<prefix>.bin/.idx/.json``, or ``<prefix>_train`` and ``<prefix>_valid`` where a valid fraction is given.

    Returns the sidecar of every prefix written. ``unit_bytes`` is the size of a work unit; it changes no output.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise UserError(f"valid_fraction is {valid_fraction}; it must be at least 0 and below 1")
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    units = plan_units(inputs, unit_bytes)
    tokenizer = Tokenizer(tokenizer_path)
    prefix = Path(output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _sigterm_raises(), tempfile.TemporaryDirectory(prefix=f"{prefix.name}.partial-", dir=prefix.parent) as folder:
        job = Job(tokenizer, Path(folder), valid_fraction, key, append_eod)
        try:
            outputs = _tokenize(job, units, workers, progress)
            return _publish(job, outputs, prefix)
        except BrokenProcessPool as error:
            raise UserError(f"a worker of {workers} was killed, most often for lack of memory; use fewer workers") from error
        except OSError as error:
            place = error.filename or prefix
            raise UserError(f"{place}: {error.strerror or error}; check the rights and the free space of {prefix.parent}") from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a cancelled job also cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def _exit(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Output:
    """One split under construction."""

    def __init__(self, job: Job, split: str) -> None:
        self.split = split
        self.path = job.folder / split
        self.lengths: list[np.ndarray] = []
        self.counts = np.zeros(job.tokenizer.vocab_size, np.int64)
        self.text_bytes = 0

    def append(self, shard: Shard) -> None:
        """Take over a shard and delete its file."""
        with open(shard.path, "rb") as source, open(self.path.with_suffix(".bin"), "ab") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        shard.path.unlink()
        self.lengths.append(np.array(shard.lengths, np.int32))
        self.counts += shard.counts
        self.text_bytes += shard.text_bytes

    def finish(self, tokenizer: Tokenizer) -> Sidecar:
        """Write index and sidecar."""
        lengths = np.concatenate(self.lengths)
        write_index(self.path.with_suffix(".idx"), lengths, token_dtype(tokenizer.vocab_size))
        score = bits_per_byte(self.counts, self.text_bytes)
        sidecar = Sidecar(
            tokenizer.fingerprint, tokenizer.vocab_size, len(lengths), int(lengths.sum(dtype=np.int64)), self.text_bytes, score
        )
        sidecar.write(self.path.with_suffix(".json"))
        return sidecar


def _tokenize(job: Job, units: list[Unit], workers: int, progress: bool) -> list[_Output]:
    from tqdm import tqdm

    outputs = [_Output(job, split) for split in job.splits]
    waiting: dict[int, UnitReport] = {}
    num_appended = num_empty = 0
    total = sum(unit.num_bytes for unit in units)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None if progress else True) as bar:
        for ordinal, report in _reports(job, units, workers):
            bar.update(units[ordinal].num_bytes)
            num_empty += report.num_empty
            waiting[ordinal] = report
            while num_appended in waiting:  # in the order of the input, whichever unit came first
                shards = waiting.pop(num_appended).shards
                for output in outputs:
                    output.append(shards[output.split])
                num_appended += 1
    if num_empty:
        logger.warning("skipped %d empty documents", num_empty)
    return outputs


def _reports(job: Job, units: list[Unit], workers: int) -> Iterator[tuple[int, UnitReport]]:
    """Reports as they come; the first failure stops every worker and is raised here."""
    if workers == 1:
        yield from ((ordinal, tokenize_unit(job, ordinal, unit)) for ordinal, unit in enumerate(units))
        return
    # spawn, not fork: the caller may hold threads (torch), and a worker imports nothing slow
    context = get_context("spawn")
    stop: Any = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(units)), context, start_worker, (job, stop))
    try:
        pending = {pool.submit(run_unit, ordinal, unit) for ordinal, unit in enumerate(units)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        stop.set()  # nobody is at work any more unless something failed
        pool.shutdown(wait=True, cancel_futures=True)


def _publish(job: Job, outputs: list[_Output], prefix: Path) -> dict[str, Sidecar]:
    sidecars = {_final(prefix, output.split): output.finish(job.tokenizer) for output in outputs}
    for final, sidecar in sidecars.items():
        if not sidecar.documents:
            raise UserError(f"no document for {final} (valid_fraction {job.valid_fraction}); give more text or change the fraction")
    for output, final in zip(outputs, sidecars, strict=True):
        Path(f"{final}.idx").unlink(missing_ok=True)  # an older index must never meet the new tokens
        for suffix in (".bin", ".json", ".idx"):
            output.path.with_suffix(suffix).replace(f"{final}{suffix}")
    return sidecars


def _final(prefix: Path, split: str) -> str:
    return str(prefix) if split == "all" else f"{prefix}_{split}"
