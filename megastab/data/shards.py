"""What one worker process does with one unit of input: tokenize it into shard files of its own, then mark them as finished.

Tokens go straight to disk as raw arrays; lengths and counts go into the marker (``finished.py``), which the merging reads. The split of
a document is decided by a hash of its content, so that it depends neither on the workers nor on the order of the files, and duplicates
never straddle train and valid.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from megastab.config.errors import UserError
from megastab.data.documents import Unit, read_documents, state_of
from megastab.data.finished import Part, Split, new_digest
from megastab.data.index_file import token_dtype
from megastab.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 18  # large enough to hide the cost of a write, small enough to stop soon


@dataclass(frozen=True)
class Job:
    """What all units of a run share."""

    tokenizer: Tokenizer
    folder: Path
    valid_fraction: float
    key: str
    append_eod: bool

    @property
    def options(self) -> list[object]:
        """What decides a unit's tokens besides the unit."""
        eod = self.tokenizer.eod if self.append_eod else None
        return [self.tokenizer.fingerprint, self.tokenizer.vocab_size, eod, self.valid_fraction, self.key]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return ("train", "valid") if self.valid_fraction > 0 else ("all",)

    def split_of(self, document: bytes) -> str:
        """Which output a document belongs to."""
        if self.valid_fraction <= 0:
            return "all"
        draw = int.from_bytes(blake2b(document, digest_size=8).digest(), "big")
        return "valid" if draw < self.valid_fraction * 2.0**64 else "train"


@dataclass
class Shard:
    """One split's share of a unit under construction; tokens go to ``stream``."""

    stream: IO[bytes]
    counts: np.ndarray
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0
    num_bytes: int = 0
    digest: Any = field(default_factory=new_digest)

    def append(self, ids: np.ndarray, dtype: np.dtype) -> None:
        """Write tokens and count them."""
        data = ids.astype(dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)
        self.counts += np.bincount(ids, minlength=len(self.counts))

    def facts(self) -> Split:
        """For the marker."""
        seen = np.flatnonzero(self.counts)
        lengths = np.array(self.lengths, np.int32)
        return Split(lengths, seen.astype(np.int32), self.counts[seen], self.text_bytes, self.num_bytes, self.digest.hexdigest())


@dataclass
class UnitReport:
    """A unit under way."""

    shards: dict[str, Shard]
    num_empty: int = 0


class Stopped(Exception):
    """Another worker failed or the user interrupted; this one gives up quietly."""


def tokenize_unit(job: Job, name: str, unit: Unit, stop: Any = None) -> None:
    """Write ``<folder>/<name>.<split>`` for every split, then the marker.

    Raises:
        UserError: bad input, or a file that changed since the work was planned.
        Stopped: ``stop`` was set meanwhile.
    """
    zeros = np.zeros(job.tokenizer.vocab_size, np.int64)
    with ExitStack() as stack:
        streams = {split: stack.enter_context(open(job.folder / f"{name}.{split}", "wb")) for split in job.splits}
        report = UnitReport({split: Shard(stream, zeros.copy()) for split, stream in streams.items()})
        for batch in _batches(job, unit, report):
            if stop is not None and stop.is_set():
                raise Stopped
            _write_batch(job, batch, report)
    if state_of(unit.path) != unit.state:
        raise UserError(f"{unit.path}: changed while it was read; start again once it is whole")
    Part({split: shard.facts() for split, shard in report.shards.items()}, report.num_empty).write(job.folder, name)


def _batches(job: Job, unit: Unit, report: UnitReport) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in read_documents(unit, job.key):
        if not document:
            report.num_empty += 1
            continue
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(job: Job, batch: list[bytes], report: UnitReport) -> None:
    dtype = token_dtype(job.tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in job.splits}
    end = [np.array([job.tokenizer.eod], np.int32)] if job.append_eod else []
    for document, ids in zip(batch, job.tokenizer.encode_batch(batch), strict=True):
        split = job.split_of(document)
        tokens[split] += [ids, *end]
        report.shards[split].lengths.append(len(ids) + len(end))
        report.shards[split].text_bytes += len(document)
    for split, arrays in tokens.items():
        if arrays:
            report.shards[split].append(np.concatenate(arrays), dtype)


_job: Job
_stop: Any


def start_worker(job: Job, stop: Any) -> None:
    """Initializer of a worker: keep what all units share, leave Ctrl-C to the parent, and do not outlive it."""
    global _job, _stop
    _job, _stop = job, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def run_unit(name: str, unit: Unit) -> Unit:
    """Body of a worker."""
    tokenize_unit(_job, name, unit, _stop)
    return unit
