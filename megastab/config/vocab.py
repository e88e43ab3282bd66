"""How many rows the embedding has for a vocabulary."""

from __future__ import annotations

# Tensor cores want multiples of 64, and 128 divides over every usual tensor-parallel size, so that the number of rows, and
# with it the initial weights, does not depend on the layout.
VOCAB_MULTIPLE = 128


def padded_vocab(vocab_size: int) -> int:
    """``vocab_size`` rounded up to a multiple of 128, whatever the layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
