"""Whole matrices by canonical name, a range of rows at a time, from our own weights or from a Hugging Face directory.

Rows are read where they lie: memory is bounded by what is asked for, and nothing in a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from megastab.checkpoint.hf_files import HuggingFaceFiles
from megastab.checkpoint.hf_names import BUFFERS, HEAD, PREFIXES, Home, homes_of, shape_of, tenants_of
from megastab.checkpoint.safetensors_file import DTYPES, read_header
from megastab.config.errors import UserError
from megastab.config.schema import ModelConfig
from megastab.config.vocab import padded_vocab

VOCABULARY = ("embedding", "head")
CHUNK_ROWS = 4096  # of two tensors that are compared


class WeightSource(Protocol):
    """Where weights come from."""

    def names(self) -> list[str]:
        """The canonical names it holds."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix, vocabulary padding included."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix, or elements of a vector."""
        ...


class OwnWeights:
    """The ``weights`` folder of a checkpoint: pieces of matrices, each file naming the first row of its own."""

    def __init__(self, folder: Path):
        self._pieces: dict[str, list[tuple[int, int, Path]]] = {}  # first row, row after the last, file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in sorted(folder.glob("*.safetensors")):
            entries = read_header(path)
            for name, start in _starts(path).items():
                entry = entries[name]
                self._pieces.setdefault(name, []).append((start, start + entry.shape[0], path))
                self._dtypes[name] = DTYPES[entry.dtype]
                self._shapes[name] = entry.shape
        if not self._pieces:
            raise UserError(f"no weights in {folder}: give the folder of one checkpoint, such as runs/NAME/checkpoints/step00000100")
        for name, pieces in self._pieces.items():
            pieces.sort()
            self._shapes[name] = (_whole(name, pieces, folder), *self._shapes[name][1:])

    def names(self) -> list[str]:
        """As :class:`WeightSource`."""
        return sorted(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """As :class:`WeightSource`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As :class:`WeightSource`."""
        return self._dtypes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """As :class:`WeightSource`."""
        found = []
        for first, after, path in self._pieces[name]:
            low, high = max(first, start), min(after, stop)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    found.append(file.get_slice(name)[low - first : high - first])
        return found[0] if len(found) == 1 else torch.cat(found)


def _starts(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "starts" not in metadata:
        raise UserError(f"{path} is no weights file of ours (it does not say which rows it holds): give a checkpoint, or what import wrote")
    return dict(json.loads(metadata["starts"]))


def _whole(name: str, pieces: list[tuple[int, int, Path]], folder: Path) -> int:
    """Rows of a matrix; an error where some are missing."""
    stop = 0
    for first, after, _ in pieces:
        if first != stop:
            raise UserError(f"{folder} lacks rows {stop} to {first - 1} of {name}: a file of another rank is missing")
        stop = after
    return stop


class HuggingFaceWeights:
    """The tensors of a Hugging Face directory under our names; vocabulary padding reads as zeros."""

    def __init__(self, files: HuggingFaceFiles, model: ModelConfig, kind: str):
        self._files, self._homes = files, homes_of(model, kind)
        self._padded = {name: padded_vocab(model.vocab_size or 0) for name in VOCABULARY if name in self._homes}
        has_prefix = any(name.startswith(PREFIXES[kind]) for name in files.entries)
        self._dropped = "" if has_prefix else PREFIXES[kind]
        self._check(model)

    def _stored(self, tensor: str) -> str:
        """A tensor's name in these files: those of the bare model leave the prefix out."""
        return tensor.removeprefix(self._dropped)

    def _check(self, model: ModelConfig) -> None:
        """Every tensor is there, has the shape the config tells, holds ordinary numbers; and nothing is left over."""
        tenants, entries = tenants_of(self._homes), self._files.entries
        wanted = {self._stored(tensor): shape_of([self._homes[name] for name in names]) for tensor, names in tenants.items()}
        problems = [f"lacks {_some(missing)}" for missing in [[name for name in wanted if name not in entries]] if missing]
        present = {name: entries[name] for name in wanted if name in entries}
        problems += [f"{name} is {_by(present[name].shape)}, config.json says {_by(wanted[name])}" for name in present
                     if present[name].shape != wanted[name]]  # fmt: skip
        quantised = [name for name, entry in present.items() if entry.dtype not in DTYPES]
        if quantised:
            problems.append(f"holds {present[quantised[0]].dtype} numbers in {_some(quantised)}: quantised; import what it was made from")
        extra = [name for name in entries if name not in wanted and not BUFFERS.search(name)]
        if HEAD in extra and model.tie_embeddings and not problems:
            extra.remove(HEAD)
            problems += self._untied()
        if extra:
            problems.append(f"holds {_some(extra)} besides, which a model of this config has no place for")
        if problems:
            raise UserError("\n  ".join([f"{self._files.folder} cannot be imported:", *problems]))

    def _untied(self) -> list[str]:
        """A head stored beside the embedding it is tied to must be the same numbers."""
        embedding = self._stored(self._homes["embedding"].tensor)
        if self._files.entries[HEAD] == self._files.entries[embedding]:
            rows = self._files.entries[HEAD].shape[0]
            chunks = (slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS))
            if all(torch.equal(self._files.read(HEAD, chunk), self._files.read(embedding, chunk)) for chunk in chunks):
                return []
        return [f"config.json has tie_word_embeddings = true, but {HEAD} is not {embedding}: set tie_word_embeddings to false there"]

    def names(self) -> list[str]:
        """As :class:`WeightSource`."""
        return list(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As :class:`WeightSource`."""
        home = self._homes[name]
        rows = self._padded.get(name, home.rows)
        return (rows,) if home.width is None else (rows, home.width)

    def dtype(self, name: str) -> torch.dtype:
        """As :class:`WeightSource`."""
        return DTYPES[self._files.entries[self._stored(self._homes[name].tensor)].dtype]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """As :class:`WeightSource`."""
        home = self._homes[name]
        if stop <= home.rows:
            return self._read(home, start, stop)
        padding = torch.zeros(stop - max(start, home.rows), *self.shape(name)[1:], dtype=self.dtype(name))
        return torch.cat([self._read(home, start, home.rows), padding]) if start < home.rows else padding

    def _read(self, home: Home, start: int, stop: int) -> Tensor:
        there, rows = self._stored(home.tensor), slice(home.first + start, home.first + stop)
        return self._files.read(there, slice(None), rows).t() if home.is_turned else self._files.read(there, rows)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def stored_dtype(source: Any) -> torch.dtype:
    """The dtype of most of a source's matrices: the embedding's."""
    return source.dtype("embedding")
