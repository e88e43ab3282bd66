"""Mix sources by weight: which source, and which of its samples, is a closed form of the global sample index.

Weights become whole numbers of slots in a period of P = 65536 samples. Source k, with c_k slots, wants its r-th sample at the
time (r + 1/2) P / c_k; slots are those times in order (ties to the lower source). Up to any time a source is within 1/2 sample of
its due, hence the slot number is within K/2 of the time for K sources, and after n samples

    |count_k - n w_k| <= (1 + K w_k) / 2 + n / P,

the last term because c_k / P is w_k to within 1 / P. Nothing depends on how many samples a run will take.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megastab.config.errors import UserError
from megastab.data.indexed import open_indexed
from megastab.data.samples import PackedSamples, Sample, SampleSource
from megastab.data.tokenizer import Tokenizer

PERIOD = 65536


def slots_per_source(weights: Sequence[float]) -> np.ndarray:
    """Weights as counts that sum to ``PERIOD``: rounded down, the rest to the largest remainders."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    counts = np.floor(share).astype(np.int64)
    missing = PERIOD - int(counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:missing]] += 1
    if (counts < 1).any():
        smallest = int(np.argmin(counts))
        raise UserError(f"blend weight {weights[smallest]} is below 1/{PERIOD} of the sum; raise it or leave that dataset out")
    return counts


class Blend:
    """Sources in fixed proportions; a single source passes through unchanged."""

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]) -> None:
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise UserError(f"a blend needs one positive weight per dataset, not {list(weights)} for {len(sources)} datasets")
        self.sources = list(sources)
        self.seq_len = sources[0].seq_len
        self.counts = slots_per_source(weights)
        due = np.concatenate([(np.arange(count) + 0.5) * (PERIOD / count) for count in self.counts])
        owners = np.repeat(np.arange(len(sources)), self.counts)
        order = np.lexsort((owners, due))
        self._owner = owners[order]
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        self._rank = ranks[order]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample of that source) of a global sample index."""
        period, slot = divmod(int(index), PERIOD)
        owner = int(self._owner[slot])
        return owner, period * int(self.counts[owner]) + int(self._rank[slot])

    def __getitem__(self, index: int) -> Sample:
        source, inner = self.locate(index)
        return self.sources[source][inner]

    def trace(self, index: int) -> tuple[str, list[int]]:
        """Dataset prefix and document numbers of a global sample."""
        source, inner = self.locate(index)
        return self.sources[source].trace(inner)

    @property
    def first_epoch_samples(self) -> int:
        """Global index at which the first source runs out."""
        ends = []
        for number, source in enumerate(self.sources):
            period, rank = divmod(source.first_epoch_samples, int(self.counts[number]))
            ends.append(period * PERIOD + int(np.flatnonzero(self._owner == number)[rank]))
        return min(ends)


def open_blend(
    entries: Sequence[tuple[float, str]],
    seq_len: int,
    seed: int,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    shuffle: bool = True,
) -> Blend:
    """The blend of ``DataConfig.train``, or with ``shuffle=False`` that of ``DataConfig.valid``."""
    if not entries:
        raise UserError("the list of datasets is empty; write megastab.data.train as [[1.0, 'path/prefix']]")
    files = [open_indexed(prefix, tokenizer, vocab_size) for _, prefix in entries]
    sources = [PackedSamples(file, seq_len, seed, shuffle=shuffle) for file in files]
    return Blend(sources, [weight for weight, _ in entries])
