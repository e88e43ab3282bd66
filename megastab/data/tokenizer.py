"""The tokenizer of a run or of data: a SentencePiece ``.model`` file or a Hugging Face ``tokenizer.json``, behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from megastab.config.errors import UserError
from megastab.data.hugging_face import HuggingFaceModel
from megastab.data.sentencepiece_model import EOD_PIECE, SentencePieceModel

__all__ = ["EOD_PIECE", "Tokenizer"]


class Model(Protocol):
    """One kind of file."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""

    def eod(self) -> int:
        """Id of the token that ends a document; UserError where there is none."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of UTF-8 texts, int32 [tokens] each."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""


class Tokenizer:
    """A file whose name ends in ``.json`` is Hugging Face's, any other SentencePiece's. Pickles as its path: each process loads its own."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {self.path}: {error.strerror}; give a SentencePiece .model file (tools/train_tokenizer.py makes one) or a "
                f"Hugging Face tokenizer.json"
            ) from error
        self.fingerprint: str = hashlib.sha256(content).hexdigest()
        kind = HuggingFaceModel if self.path.endswith(".json") else SentencePieceModel
        self._model: Model = kind(self.path, content)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        return Tokenizer, (self.path,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; ids are below it."""
        return self._model.vocab_size

    @cached_property
    def eod(self) -> int:
        """Id of the token that ends a document: ``<eod>``, or what a foreign tokenizer has for it."""
        return self._model.eod()

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text (bytes are UTF-8), without an end-of-document token."""
        ids: list[int] = self.encode_array(text.encode() if isinstance(text, str) else text).tolist()
        return ids

    def encode_array(self, text: bytes) -> np.ndarray:
        """Token ids of one UTF-8 text as int32 [tokens]: for long input, which lists of Python integers slow down."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of each UTF-8 text, int32 [tokens]: the fastest way for many."""
        return self._model.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; end-of-document tokens leave no trace."""
        return self._model.decode([int(i) for i in ids])
