"""Floating-point operations of one rank."""

from __future__ import annotations

from megastab.config.config import Config
from megastab.config.vocab import padded_vocab
from megastab.model.counts import block_matrices
from megastab.plan.activations import Shape
from megastab.plan.parameters import Stage


def stage_flops(config: Config, stage: Stage) -> tuple[float, float]:
    """(forward, recomputed) FLOPs of one micro-batch on one rank."""
    model, shape, recompute = config.megastab.model, Shape.of(config), config.megastab.parallel.recompute
    # Causal: half of all pairs. Ranks that share a sequence have all pairs of a share of the heads, so each token of theirs costs the same.
    attention = 2.0 * shape.seq * model.hidden_size * stage.num_blocks
    blocks = 2.0 * block_matrices(model) * stage.num_blocks + attention
    head = 2.0 * padded_vocab(model.vocab_size or 0) * model.hidden_size if stage.has_head else 0.0
    again = {"none": 0.0, "selective": attention, "full": blocks}[recompute]
    each = shape.tokens / shape.tensor
    return each * (blocks + head), each * again
