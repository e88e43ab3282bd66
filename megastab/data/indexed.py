"""Open a Megatron ``.bin/.idx`` dataset after checks that cost milliseconds, as one flat array of tokens and a table of documents.

Files of Megatron-LM itself work unchanged: a document may be several sequences, and a sidecar is optional. Reading goes through
megatron-core's ``IndexedDataset``; it is imported only once the files have passed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megastab.config.errors import UserError
from megastab.data.index_file import check_tables, read_header
from megastab.data.sidecar import read_sidecar
from megastab.data.tokenizer import Tokenizer

_PROBES, _PROBE_TOKENS = 64, 4096  # windows of the .bin whose ids are checked, evenly spread


@dataclass(frozen=True)
class TokenFile:
    """A dataset on disk. ``tokens`` is a view of the mapped file, valid as long as this object; copy what is to be kept."""

    prefix: str
    tokens: np.ndarray
    """All tokens, in file order."""
    starts: np.ndarray
    """First token of each document, int64."""
    lengths: np.ndarray
    """Tokens of each document, int64."""
    dataset: Any = None
    """megatron-core's ``IndexedDataset``, which owns the mapping."""


def open_indexed(prefix: str | Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> TokenFile:
    """Check and map ``<prefix>.bin/.idx``. ``vocab_size`` is the model's, ``tokenizer`` the run's."""
    prefix = str(prefix)
    index_path = _existing(prefix)
    header = read_header(index_path)
    check_tables(index_path, header)
    _check_sidecar(prefix, tokenizer, vocab_size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core tells every importer that Apex is absent
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    dataset = IndexedDataset(prefix)
    ends = np.zeros(header.num_sequences + 1, np.int64)
    np.cumsum(dataset.sequence_lengths, out=ends[1:])
    tokens = dataset.bin_reader.read(dtype=header.dtype, count=int(ends[-1]), offset=0)
    _check_ids(prefix, tokens, vocab_size or (tokenizer.vocab_size if tokenizer else None))
    bounds = ends[dataset.document_indices]
    return TokenFile(prefix, tokens, bounds[:-1], np.diff(bounds), dataset)


def _existing(prefix: str) -> Path:
    missing = [f"{prefix}{suffix}" for suffix in (".idx", ".bin") if not Path(f"{prefix}{suffix}").is_file()]
    if missing:
        hint = "give the path without .bin or .idx" if prefix.endswith((".bin", ".idx")) else "make it with tools/prepare_data.py"
        raise UserError(f"dataset {prefix}: no file {' and no file '.join(missing)}; {hint}")
    return Path(f"{prefix}.idx")


def _check_sidecar(prefix: str, tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return
    if tokenizer is not None and (sidecar.tokenizer, sidecar.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
        wrote = f"{sidecar.tokenizer[:12]}, {sidecar.vocab_size} pieces"
        runs = f"{tokenizer.path} is {tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} pieces"
        raise UserError(f"dataset {prefix}: was written with another tokenizer ({wrote}; {runs}); give that one or prepare the data again")
    if vocab_size is not None and sidecar.vocab_size > vocab_size:
        pieces = f"its tokenizer has {sidecar.vocab_size} pieces"
        raise UserError(f"dataset {prefix}: {pieces} but the model only vocab_size {vocab_size}; raise model.vocab_size")


def _check_ids(prefix: str, tokens: np.ndarray, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    for start in np.linspace(0, max(len(tokens) - _PROBE_TOKENS, 0), _PROBES, dtype=np.int64):
        window = tokens[start : start + _PROBE_TOKENS]
        if window.max() >= vocab_size or window.min() < 0:
            worst = window.max() if window.max() >= vocab_size else window.min()
            raise UserError(
                f"dataset {prefix}: holds token id {worst}, outside vocab_size {vocab_size}; use the tokenizer it was made with"
            )
