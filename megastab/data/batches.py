"""Micro-batches of one data-parallel rank, or of one of the ranks that share its sequences. The exact position in the data is one
integer, the count of consumed samples.

A step takes the next micro_batch * accumulation * dp_size samples from ``consumed`` on that are not left out, whatever the layout;
micro-batch m of rank r takes ``micro_batch`` of them from place ``(m * dp_size + r) * micro_batch`` of that list on. Shapes: B
micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megastab.data.samples import SampleSource
from megastab.data.skips import Skips


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one data-parallel rank gets, on the CPU."""

    tokens: Tensor
    """int64 [B, S]."""
    labels: Tensor
    """int64 [B, S]: the token after each input."""
    weights: Tensor
    """float32 [B, S]: 1 for a target that counts, 0 for a masked one."""
    sample_ids: Tensor
    """int64 [B]: global sample index, the key of dropout."""
    document_ids: Tensor | None
    """int32 [B, S], ascending from 0 in each row, of the whole sequence where ranks share it; only with a document mask."""
    first_position: int = 0
    """Position of the first column of tokens, labels and weights in its sample: not 0 where ranks share a sequence."""

    def share(self, rank: int, size: int) -> MicroBatch:
        """The positions of rank ``rank`` of the ``size`` that share each sequence."""
        if size == 1:
            return self
        length = self.tokens.shape[1] // size
        first = rank * length
        tokens, labels, weights = (x[:, first : first + length].contiguous() for x in (self.tokens, self.labels, self.weights))
        return MicroBatch(tokens, labels, weights, self.sample_ids, self.document_ids, first)


def assemble(source: SampleSource, first: int, count: int, document_mask: bool, stop: int | None = None) -> MicroBatch:
    """Samples [first, first + count) as one micro-batch; those from ``stop`` on are padding of weight 0."""
    return assemble_samples(source, np.arange(first, first + count), document_mask, stop)


def assemble_samples(source: SampleSource, sample_ids: np.ndarray, document_mask: bool, stop: int | None = None) -> MicroBatch:
    """The samples ``sample_ids``, int64 [B], as one micro-batch; those from ``stop`` on are padding of weight 0."""
    count = len(sample_ids)
    tokens = np.zeros((count, source.seq_len + 1), np.int64)
    weights = np.zeros((count, source.seq_len), np.float32)
    documents = np.zeros((count, source.seq_len), np.int32)
    for row, sample in enumerate(sample_ids.tolist()):
        if stop is None or sample < stop:
            tokens[row], documents[row], is_same_document = source[sample]
            weights[row] = is_same_document if document_mask else 1.0
    tokens_BS1 = torch.from_numpy(tokens)
    return MicroBatch(
        tokens=tokens_BS1[:, :-1].contiguous(),
        labels=tokens_BS1[:, 1:].contiguous(),
        weights=torch.from_numpy(weights),
        sample_ids=torch.from_numpy(sample_ids.copy()),
        document_ids=torch.from_numpy(documents) if document_mask else None,
    )


class Batches:
    """Endless training steps; save ``consumed`` and pass it back as ``start``, at any layout, to go on exactly there."""

    def __init__(
        self,
        source: SampleSource,
        *,
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        document_mask: bool,
        start: int = 0,
        skips: Skips | None = None,
        cp_rank: int = 0,
        cp_size: int = 1,
    ) -> None:
        self.source = source
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self.document_mask = document_mask
        self.consumed = start
        """One past the last sample taken, those left out included."""
        self.skips = Skips() if skips is None else skips
        self.last_step: tuple[int, int] | None = None
        """First and last sample of the step last fetched; between them some may be left out."""

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * self.dp_size

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of one optimizer step."""
        taken = self.skips.take(self.consumed, self.global_batch)
        self.last_step = int(taken[0]), int(taken[-1])
        self.consumed = self.last_step[1] + 1
        of_rank = taken.reshape(self.accumulation, self.dp_size, self.micro_batch)[:, self.dp_rank]
        whole = (assemble_samples(self.source, samples, self.document_mask) for samples in of_rank)
        return [batch.share(self.cp_rank, self.cp_size) for batch in whole]


@dataclass(frozen=True)
class Evaluation:
    """The first ``num_samples`` samples of a source, each exactly once over the ranks; iterate it anew for every evaluation.

    Every rank runs the same number of micro-batches; rows beyond the last sample are padding of weight 0.
    """

    source: SampleSource
    num_samples: int
    micro_batch: int
    dp_rank: int
    dp_size: int
    document_mask: bool
    cp_rank: int = 0
    cp_size: int = 1

    def __len__(self) -> int:
        return -(-self.num_samples // (self.micro_batch * self.dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch
            whole = assemble(self.source, first, self.micro_batch, self.document_mask, stop=self.num_samples)
            yield whole.share(self.cp_rank, self.cp_size)


def evaluation_batches(
    source: SampleSource,
    num_samples: int,
    *,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    document_mask: bool,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> Evaluation:
    """``run.eval_samples`` samples, or as many as the first epoch has; open the source with ``shuffle=False``."""
    available = min(num_samples, source.first_epoch_samples)
    return Evaluation(source, available, micro_batch, dp_rank, dp_size, document_mask, cp_rank, cp_size)
