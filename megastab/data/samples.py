"""Packed samples: the documents of an epoch shuffled, laid end to end, and cut every ``seq_len`` tokens.

Sample i is a pure function of (seed, epoch, source name) and i; nothing is remembered between calls but the current order. An
order is a sort of Philox words keyed by those three: numpy promises the words for ever, not the shuffles built on them. A sample
has ``seq_len + 1`` tokens and shares the last one with its successor, so that every token but the first of an epoch is a target
once; the fewer than ``seq_len`` tokens left at the end of an epoch are dropped, others each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megastab.config.errors import UserError
from megastab.data.indexed import TokenFile


class Sample(NamedTuple):
    """One training sequence; S is ``seq_len``."""

    tokens: np.ndarray
    """int64 [S + 1]: inputs are the first S, targets the last S."""
    document_ids: np.ndarray
    """int32 [S]: document of each input, counted from 0 within the sample."""
    is_same_document: np.ndarray
    """bool [S]: the target belongs to the document of its input."""


class SampleSource(Protocol):
    """Anything that answers for every sample index."""

    seq_len: int

    @property
    def first_epoch_samples(self) -> int:
        """Leading samples before any document comes a second time."""

    def __getitem__(self, index: int) -> Sample: ...

    def trace(self, index: int) -> tuple[str, list[int]]:
        """Where a sample came from: dataset prefix and numbers of its documents there."""


class _Epoch(NamedTuple):
    documents: np.ndarray
    """Document numbers in the order of the epoch."""
    ends: np.ndarray
    """Tokens up to and including each of them."""
    samples: np.ndarray | None
    """Order in which samples are handed out; None is ascending."""


def permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of ``range(size)`` that depends on ``key`` alone: random words with the index in their low bits, sorted."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.uint64(max(size - 1, 1).bit_length())
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    words >>= bits
    words <<= bits
    words |= np.arange(size, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.view(np.int64)


@dataclass
class PackedSamples:
    """Samples of one dataset. ``shuffle=False`` is for evaluation: file order, one epoch.

    ``name`` keys the order and defaults to the last part of the prefix, so that moving the files changes nothing.
    """

    file: TokenFile
    seq_len: int
    seed: int = 0
    name: str | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        self.name = self.name or Path(self.file.prefix).name
        self._documents = np.flatnonzero(self.file.lengths)  # an empty document has no place in the stream
        num_tokens = int(self.file.lengths.sum())
        self.first_epoch_samples = (num_tokens - 1) // self.seq_len
        if self.first_epoch_samples < 1:
            needed = f"one sample of seq_len {self.seq_len} needs {self.seq_len + 1}"
            raise UserError(
                f"dataset {self.file.prefix}: holds {num_tokens} tokens but {needed}; give more text or lower model.max_seq_len"
            )
        self._epochs: dict[int, _Epoch] = {}

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # two, because a step may straddle a boundary
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._order(epoch)
        return self._epochs[epoch]

    def _order(self, epoch: int) -> _Epoch:
        documents, samples = self._documents, None
        if self.shuffle:
            documents = documents[permutation(len(documents), "documents", self.seed, epoch, self.name)]
            samples = permutation(self.first_epoch_samples, "samples", self.seed, epoch, self.name)
        return _Epoch(documents, np.cumsum(self.file.lengths[documents]), samples)

    def _locate(self, index: int) -> tuple[_Epoch, int, int, int]:
        """(epoch, first token of the sample in the epoch's stream, its first document, its last) by position in the order."""
        number, slot = divmod(int(index), self.first_epoch_samples)
        if index < 0 or (number and not self.shuffle):
            raise IndexError(f"sample {index} of {self.file.prefix}, which has {self.first_epoch_samples} in an epoch")
        epoch = self._epoch(number)
        start = (slot if epoch.samples is None else int(epoch.samples[slot])) * self.seq_len
        first, last = np.searchsorted(epoch.ends, (start, start + self.seq_len), side="right")
        return epoch, start, int(first), int(last)

    def __getitem__(self, index: int) -> Sample:
        epoch, start, first, last = self._locate(index)
        stop = start + self.seq_len + 1
        counts = np.diff(epoch.ends[first:last], prepend=start, append=stop)
        documents, ends = epoch.documents[first : last + 1], epoch.ends[first : last + 1]
        # from a place in the stream to a place in the file: constant within a document
        shifts = self.file.starts[documents] + self.file.lengths[documents] - ends
        ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        tokens = self.file.tokens[np.arange(start, stop) + shifts[ids]].astype(np.int64)
        return Sample(tokens, ids[:-1], ids[1:] == ids[:-1])

    def trace(self, index: int) -> tuple[str, list[int]]:
        """Prefix of the dataset and the numbers of the documents in a sample."""
        epoch, _, first, last = self._locate(index)
        return self.file.prefix, epoch.documents[first : last + 1].tolist()
