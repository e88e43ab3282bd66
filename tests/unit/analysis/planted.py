"""A model that has one massive activation, by construction, and needs it.

Width 32, four heads of eight channels. The BOS token's embedding is 5,000 in ``CHANNEL`` and nothing else; every other token's is 1 in
``STEADY``, 0 in ``CHANNEL`` and random elsewhere. Queries read ``STEADY`` and keys ``CHANNEL``, in channel 7 of a head, which belongs
to the slowest pair of the rotation in either layout: so all queries look at BOS, with a logit of 4 * 4 * 32 / sqrt(8) = 181, whose
value is 0, and attention adds nothing. The head then reads the next token of the cycle 3, 4, ..., V-1, 3 from the embedding. With the
entry gone all keys look alike, and what comes is the mean of large random values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megastab.analysis.subject import Linear, Subject

CHANNEL, STEADY, SIZE = 13, 5, 5000.0
WIDTH, HEAD = 32, 8
BOS, FIRST = 1, 3


@torch.no_grad()
def plant(subject: Subject, embedding: nn.Parameter, head: nn.Parameter, first_layer: int = 0) -> Subject:
    """Overwrite the weights of a LLaMA-shaped model with untied head; the entry appears after ``first_layer``."""
    generator = torch.Generator().manual_seed(3)
    vocab = subject.vocab_size
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    embedding[:, CHANNEL], embedding[:, STEADY] = 0.0, 1.0
    embedding[BOS] = 0.0
    head.zero_()
    following = torch.arange(FIRST, vocab) + 1
    following[-1] = FIRST
    head[following] = embedding[FIRST:vocab]
    head[:, STEADY] = 0.0
    embedding[BOS, CHANNEL] = SIZE if first_layer == 0 else 1.0
    for linear in subject.linears():
        for role, matrix in _logical(linear):
            matrix.zero_()
            if linear.layer <= first_layer:
                _write(role, matrix, linear.layer == first_layer > 0)
            elif role == "q":
                matrix[HEAD - 1 :: HEAD, STEADY] = 4.0
            elif role == "k":
                matrix[HEAD - 1 :: HEAD, CHANNEL] = 4.0
            elif role in ("v", "o"):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 3)
                if role == "v":
                    matrix[:, CHANNEL] = 0.0
    return subject


def _write(role: str, matrix: Tensor, is_writer: bool) -> None:
    """The MLP of ``first_layer`` turns the 1 of BOS, sqrt(32) behind the norm, into ``SIZE``; that of layers below does nothing.

    silu(10 sqrt(32)) is 10 sqrt(32) to the last bit, and so with the up product 1 * sqrt(32) what arrives is 320 times down's weight.
    """
    if is_writer and role == "gate":
        matrix[0, CHANNEL] = 10.0
    if is_writer and role == "up":
        matrix[0, CHANNEL] = 1.0
    if is_writer and role == "down":
        matrix[CHANNEL, 0] = (SIZE - 1.0) / 320.0


def _logical(linear: Linear) -> Iterator[tuple[str, Tensor]]:
    """(role, [out, in]) of the matrices in a weight."""
    weight = linear.weight.T if linear.is_transposed else linear.weight
    return zip(linear.role.split("+"), weight.split(linear.parts), strict=True)


def cycle(vocab: int, length: int, start: int = FIRST) -> list[int]:
    """Tokens of the text such a model knows."""
    return [FIRST + (start - FIRST + i) % (vocab - FIRST) for i in range(length)]


def windows(vocab: int, number: int, seq: int, bos: bool) -> Tensor:
    """[N, S] of it."""
    rows = [[BOS] * bos + cycle(vocab, seq - bos, FIRST + 7 * i) for i in range(number)]
    return torch.tensor(rows)
