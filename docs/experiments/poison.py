"""A copy of a dataset in which the batches of chosen steps are bad, so that training itself needs no change.

Which tokens a sample is made of is asked of the data room: the same order over a file whose tokens are their own positions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from megastab.data.blend import Blend
from megastab.data.index_file import read_header
from megastab.data.indexed import TokenFile, open_indexed
from megastab.data.samples import PackedSamples

Kind = Literal["noise", "repeat"]


def positions_of(file: TokenFile, samples: range, seq_len: int, seed: int) -> np.ndarray:
    """int64 [samples, seq_len + 1]: where in the file the tokens of training samples stand, for ``run.seed`` and this one dataset."""
    where = TokenFile(file.prefix, np.arange(len(file.tokens)), file.starts, file.lengths)
    order = Blend([PackedSamples(where, seq_len, seed)], [1.0])
    if samples.stop > order.first_epoch_samples:
        raise ValueError(f"sample {samples.stop - 1} is beyond the first epoch ({order.first_epoch_samples}): it would be bad twice")
    return np.stack([order[sample].tokens for sample in samples])


def poison(source: Path, target: Path, bad_steps: Mapping[int, Kind], *, batch: int, seq_len: int, seed: int, vocab_size: int) -> None:
    """Write ``target.bin/.idx/.json``: ``source`` with every sample of ``bad_steps`` (counted from 1) replaced.

    ``noise`` is uniform over the vocabulary, ``repeat`` one token all through the batch. The first and the last token of a sample stay,
    because its neighbours in the text have them too: no other sample changes. Both prefixes must end alike, for the name keys the order.
    """
    if source.name != target.name or source == target:
        raise ValueError(f"{target} must be another folder's {source.name}: the name of a dataset is part of its order")
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(f"{source}{suffix}", f"{target}{suffix}")
    file, draw = open_indexed(source), np.random.default_rng(seed)
    tokens = np.memmap(f"{target}.bin", dtype=read_header(Path(f"{target}.idx")).dtype, mode="r+")
    for step, kind in bad_steps.items():
        inner = positions_of(file, range((step - 1) * batch, step * batch), seq_len, seed)[:, 1:-1]
        tokens[inner] = draw.integers(vocab_size, size=inner.shape) if kind == "noise" else draw.integers(vocab_size)
    tokens.flush()
