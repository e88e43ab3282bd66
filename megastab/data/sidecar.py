"""``<prefix>.json`` beside a dataset: which tokenizer wrote it, how much there is, and what a unigram model would score on it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megastab.config.errors import UserError


@dataclass(frozen=True)
class Sidecar:
    """Facts of one split."""

    tokenizer: str
    """SHA-256 of the tokenizer's model file."""
    vocab_size: int
    """Pieces of that tokenizer; every id is below it."""
    documents: int
    tokens: int
    """Tokens, end-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the raw text."""
    unigram_bits_per_byte: float
    """Entropy of the token distribution x tokens / text_bytes: what a model that has learnt only frequencies reaches."""

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def bits_per_byte(counts: np.ndarray, text_bytes: int) -> float:
    """Total unigram code length in bits, sum of -n log2(n / N), per byte of text."""
    seen = counts[counts > 0].astype(np.float64)
    return float(-(seen * np.log2(seen / seen.sum())).sum() / text_bytes) if text_bytes else 0.0


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of a dataset; None where there is none (data made by Megatron-LM itself)."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    try:
        return Sidecar(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: is not a dataset's sidecar ({error}); delete it to skip the tokenizer check, or remake the data"
        ) from error
