"""The bare loop does our engine's arithmetic, so that the bench compares like with like."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

STEPS, BATCH, SEQ, VOCAB = 4, 4, 16, 128


def source(precision: str) -> dict[str, Any]:
    from megastab.report.bench.cases import Spec

    out = Spec("both", precision=precision).source()  # type: ignore[arg-type]
    out["train_batch_size"] = BATCH
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 96, "num_heads": 2, "vocab_size": VOCAB, "max_seq_len": SEQ}
    out["megastab"]["model"].update(shape)
    return out


def both_losses(precision: str) -> tuple[list[float], list[float], bool]:
    """On one rank: the losses of both contestants, and whether every weight of ours went into the bare model."""
    import torch

    from megastab.report.bench.bare import BareLoop
    from megastab.report.bench.cases import LEARNING_RATE
    from megastab.report.bench.contestants import Ours, random_batches

    ours = Ours(source(precision))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    bare = BareLoop(ours.config.megastab.model, LEARNING_RATE, is_compiled=False, dtype=dtype)
    weights = ours.weights()
    bare.load(weights)
    is_complete = weights.keys() == bare.net.canonical().keys()
    (batch,) = random_batches(VOCAB, 1, BATCH, SEQ)
    losses = [(ours.step(batch), bare.step(batch.tokens, batch.labels)) for _ in range(STEPS)]
    mine, theirs = (list(each) for each in zip(*losses, strict=True))
    return mine, theirs, is_complete


# fp32: sums in another order. bf16: activations are rounded at other places; 2^-8 is one rounding.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2.0**-8)])
def test_bare_loop_takes_our_steps(precision: str, tolerance: float) -> None:
    ((ours, bare, is_complete),) = run_ranks(1, both_losses, precision)
    assert is_complete
    assert ours[-1] < ours[0] - 0.05, "the weights must move, or updates are not compared"
    assert bare == pytest.approx(ours, rel=tolerance)


def growth_of(num_bytes: int) -> float:
    """On one rank: what the bench says of an allocation of ``num_bytes`` that is freed again."""
    from megastab.report.bench.child import MemoryGrowth

    growth = MemoryGrowth()
    held = b"x" * num_bytes
    del held
    return growth()


def test_memory_growth_is_that_of_the_peak() -> None:
    (grown,) = run_ranks(1, growth_of, 1 << 28)
    assert 0.95 * (1 << 28) < grown < 1.5 * (1 << 28)
