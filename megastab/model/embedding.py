"""The ends of the network: tokens to residual stream, residual stream to logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megastab.config.schema import ModelConfig
from megastab.config.vocab import padded_vocab
from megastab.model.block import Dropout
from megastab.model.context import Context
from megastab.model.counts import learns_embedding_scale
from megastab.model.norms import build_norm
from megastab.parallel.grid import TensorParallel
from megastab.parallel.layers import VocabParallelEmbedding, column_product, replicated, sharded
from megastab.parallel.param_info import Part


def vocab_rows(config: ModelConfig) -> int:
    """Rows of the embedding and the head: the vocabulary padded, whatever tp."""
    assert config.vocab_size is not None, "the vocabulary is known before a model is built"
    return padded_vocab(config.vocab_size)


class TokenEmbedding(VocabParallelEmbedding):
    """[G] token ids -> [T, D]. Nothing but the matrix lives here, so that it can be tied across pipeline stages."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__("embedding", vocab_rows(config), config.hidden_size, tp)


class EmbeddingScale(nn.Module):
    """``x * factor``: ``embedding_multiplier``, times the scale DyT learns in a norm's place, sqrt(D) at the start (arXiv 2503.10622)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        self.multiplier = config.embedding_multiplier
        part = Part.whole("embedding_scale", "scale", 1, initial=math.sqrt(config.hidden_size))
        self.weight = replicated(part, None, tp, None) if learns_embedding_scale(config) else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        if self.weight is None:
            return x_TD * self.multiplier
        return (x_TD * (self.weight.float() * self.multiplier)).to(x_TD.dtype)  # fp32: its gradient is a sum over all elements


class Positions(nn.Module):
    """Adds what follows the token embedding of gpt: learned positions, the embedding's norm if there is one, and dropout."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, seed: int = 0):
        super().__init__()
        self.tp = tp
        self.weight = replicated(Part.whole("positions", "position", config.max_seq_len), config.hidden_size, tp, None)
        self.norm = build_norm("embedding_norm", config, tp) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.dropout, seed, "embedding")

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        """[T, D] -> [T, D]."""
        positions_T = context.local_tokens(self.tp, x_TD.device) % context.seq + context.first_position
        return self.dropout(self.norm(x_TD + self.weight[positions_T]), context, self.tp)


class Head(nn.Module):
    """[T, D] -> logits [G, V] of this rank's vocabulary rows; ``tied`` shares the embedding's parameter object."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, tied: nn.Parameter | None = None):
        super().__init__()
        self.tp = tp
        part = Part.cut("head", "head", vocab_rows(config), tp)
        self.weight = tied if tied is not None else sharded((part,), config.hidden_size, tp, None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [G, V]."""
        return column_product(x_TD, self.weight, None, self.tp)


def tied_head(embedding: TokenEmbedding, x_TD: Tensor) -> Tensor:
    """The head of a pipeline whose last stage holds a copy of the embedding."""
    return column_product(x_TD, embedding.weight, None, embedding.tp)


def gathered_logits(logits_GV: Tensor, vocab_size: int) -> Tensor:
    """Drop the padding columns of whole-vocabulary logits (one tensor-parallel rank)."""
    return logits_GV[:, :vocab_size].to(torch.float32)
