"""Ranks that share sequences are counted once: samples, tokens and the messages of a layer."""

from __future__ import annotations

from typing import Any

import pytest

from tests import jobs
from tests.layouts import GLOBAL_BATCH, SEQ, Layout, config_of
from tests.ranks import run_ranks

STEPS = 2


def counted(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: what the engine and we count in two steps."""
    job = jobs.start(config)
    for _ in range(STEPS):
        job.step()
    engine = job.built.engine
    ours = job.config.global_batch, job.config.tokens_per_step, job.batches.consumed
    return {"ours": ours, "engine": (engine.global_samples, engine.train_batch_size(), engine.tput_timer.batch_size)}


LAYOUTS = [Layout(1), Layout(2, zero=1), Layout(2, cp=2), Layout(4, cp=2, zero=1, accumulation=3), Layout(4, cp=2, pp=2, accumulation=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_samples_and_tokens_are_counted_once(layout: Layout) -> None:
    for found in run_ranks(layout.world, counted, config_of(layout)):
        assert found["ours"] == (GLOBAL_BATCH, GLOBAL_BATCH * SEQ, STEPS * GLOBAL_BATCH)
        assert found["engine"] == (STEPS * GLOBAL_BATCH, GLOBAL_BATCH, GLOBAL_BATCH)


def sent(recompute: Any) -> list[int]:
    """On a rank: elements of each message of a step of two layers."""
    from megastab.parallel import collectives

    job, inner, messages = jobs.start(config_of(Layout(2, cp=2, recompute=recompute))), collectives.exchange_equal, list[int]()

    def counting(x: Any, group: Any) -> Any:
        messages.append(x.numel())
        return inner(x, group)

    collectives.exchange_equal = counting
    job.step()
    return messages


@pytest.mark.parametrize(("recompute", "back"), [("none", [1, 3]), ("selective", [1, 3, 3]), ("full", [3, 1, 1, 3])])
def test_recomputation_sends_again_what_backward_needs(recompute: str, back: list[int]) -> None:
    """q, k and v are three times the output. ``back``: what backward sends for a layer, the gradients of both among it."""
    of_output = GLOBAL_BATCH * (SEQ // 2) * 32
    expected = [size * of_output for size in [3, 1] * 2 + back * 2]
    for messages in run_ranks(2, sent, recompute):
        assert messages == expected
