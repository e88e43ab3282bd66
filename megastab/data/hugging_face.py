"""Hugging Face ``tokenizer.json`` as a tokenizer of data: the text as it is, no special token put in, none found in it, nothing cut off.

What a file says about padding, truncation and templates concerns batches of a finished model, and is left out. A special token's name
that stands in a text is text: a document that talks about ``<|endoftext|>`` does not end there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megastab.config.errors import UserError

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_SETTINGS = "tokenizer_config.json"


class HuggingFaceModel:
    """The content of a ``tokenizer.json``, through the ``tokenizers`` package."""

    def __init__(self, path: str, content: bytes) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is a process; threads of its own would crowd the others
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(f"tokenizer {path}: reading a tokenizer.json needs the tokenizers package; pip install tokenizers") from error
        try:
            self._inside: Any = Tokenizer.from_str(content.decode())
        except Exception as error:  # what the package raises
            raise UserError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({error})") from error
        self._path = path
        self._inside.no_padding()
        self._inside.no_truncation()
        self._inside.encode_special_tokens = True
        self.vocab_size = 1 + max(self._inside.get_vocab(with_added_tokens=True).values(), default=-1)

    def eod(self) -> int:
        """Id of the special token with one of ``EOD_NAMES``, else of what ``tokenizer_config.json`` beside it names as ``eos_token``."""
        special = {token.content: id_ for id_, token in self._inside.get_added_tokens_decoder().items() if token.special}
        named = self._eos_of_settings()
        for name in (*EOD_NAMES, *([named] if named else [])):
            if name in special:
                return int(special[name])
        raise UserError(
            f"tokenizer {self._path}: none of its special tokens {sorted(special)[:8]} is {', '.join(EOD_NAMES)}; name the one that ends a "
            f'document in {_SETTINGS} beside it, as {{"eos_token": "..."}}'
        )

    def _eos_of_settings(self) -> str | None:
        path = Path(self._path).with_name(_SETTINGS)
        if not path.is_file():
            return None
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object ({error}); mend or remove it") from error
        return token.get("content") if isinstance(token, dict) else token

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of UTF-8 texts, int32 [tokens] each."""
        encodings = self._inside.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._inside.decode(ids, skip_special_tokens=True))
