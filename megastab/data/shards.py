"""What one worker process does with one unit of input: tokenize it into shard files of its own.

Tokens go straight to disk as raw arrays; only document lengths and token counts travel back to the parent. The split of a
document is decided by a hash of its content, so that it depends neither on the workers nor on the order of the files, and
duplicates never straddle train and valid.
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

from megastab.data.documents import Unit, read_documents
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
    """One split's share of a unit: tokens in ``path``, the rest here."""

    path: Path
    counts: np.ndarray
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0


@dataclass
class UnitReport:
    """What a worker sends back."""

    shards: dict[str, Shard]
    num_empty: int = 0


class Stopped(Exception):
    """Another worker failed or the user interrupted; this one gives up quietly."""


def tokenize_unit(job: Job, ordinal: int, unit: Unit, stop: Any = None) -> UnitReport:
    """Write ``<folder>/<ordinal>.<split>`` for every split."""
    zeros = np.zeros(job.tokenizer.vocab_size, np.int64)
    report = UnitReport({split: Shard(job.folder / f"{ordinal}.{split}", zeros.copy()) for split in job.splits})
    with ExitStack() as stack:
        streams: dict[str, IO[bytes]] = {split: stack.enter_context(open(shard.path, "wb")) for split, shard in report.shards.items()}
        for batch in _batches(job, unit, report):
            if stop is not None and stop.is_set():
                raise Stopped
            _write_batch(job, batch, report, streams)
    return report


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


def _write_batch(job: Job, batch: list[bytes], report: UnitReport, streams: dict[str, IO[bytes]]) -> None:
    tokenizer, dtype = job.tokenizer, token_dtype(job.tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in job.splits}
    end = [np.array([tokenizer.eod], np.int32)] if job.append_eod else []
    for document in batch:
        split = job.split_of(document)
        pieces = [tokenizer.encode_array(document), *end]
        tokens[split] += pieces
        report.shards[split].lengths.append(sum(map(len, pieces)))
        report.shards[split].text_bytes += len(document)
    for split, arrays in tokens.items():
        if arrays:
            ids = np.concatenate(arrays)
            ids.astype(dtype).tofile(streams[split])
            report.shards[split].counts += np.bincount(ids, minlength=tokenizer.vocab_size)


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


def run_unit(ordinal: int, unit: Unit) -> tuple[int, UnitReport]:
    """Body of a worker."""
    return ordinal, tokenize_unit(_job, ordinal, unit, _stop)
