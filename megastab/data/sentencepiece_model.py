"""SentencePiece tokenizer that gives back every byte it was given, with an end-of-document token.

A model made by ``tokenizer_training`` normalises nothing and falls back to bytes, so that ``decode(encode(text)) == text`` for
source code as for prose. SentencePiece writes a space as U+2581 inside its pieces and would turn a U+2581 of the text into a
space; that one character is therefore encoded as its three bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megastab.config.errors import UserError

EOD_PIECE = "<eod>"
_SPACE_MARK = "\u2581".encode()


class SentencePieceModel:
    """The content of a ``.model`` file."""

    def __init__(self, path: str, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"tokenizer {path}: not a SentencePiece .model file ({len(content)} bytes)") from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.vocab_size())

    def eod(self) -> int:
        """Id of ``<eod>``, or of a foreign model's ``</s>``."""
        found = self._processor.piece_to_id(EOD_PIECE)
        if self._processor.id_to_piece(found) == EOD_PIECE:
            return int(found)
        if self._processor.eos_id() >= 0:
            return int(self._processor.eos_id())
        raise UserError(
            f"tokenizer {self._path}: has neither {EOD_PIECE} nor an end-of-sentence piece; train it with tools/train_tokenizer.py"
        )

    @cached_property
    def _space_mark_ids(self) -> np.ndarray | None:
        pieces = [f"<0x{byte:02X}>" for byte in _SPACE_MARK]
        ids = [int(self._processor.piece_to_id(piece)) for piece in pieces]
        has_bytes = all(self._processor.id_to_piece(i) == piece for i, piece in zip(ids, pieces, strict=True))
        return np.array(ids, np.int32) if has_bytes else None

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of UTF-8 texts, int32 [tokens] each."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: bytes) -> np.ndarray:
        mark = self._space_mark_ids
        if mark is None or _SPACE_MARK not in text:
            return self._pieces(text)
        first, *rest = [self._pieces(part) for part in text.split(_SPACE_MARK)]
        return np.concatenate([first, *(ids for part in rest for ids in (mark, part))])

    def _pieces(self, text: bytes) -> np.ndarray:
        # One text a call: a list of texts makes SentencePiece start a thread pool, which costs 5-10 % of the work.
        ids: np.ndarray = self._processor.encode(text, return_type="numpy")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return str(self._processor.decode(ids))
