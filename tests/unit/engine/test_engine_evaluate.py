"""Evaluation gives one number at every layout, counts each sample once, and leaves training as it was."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests import jobs
from tests.layouts import GPT, SINGLE, Layout, SyntheticSource, config_of
from tests.ranks import run_ranks

SAMPLES = 21  # divides by no micro-batch here: the last one is padded
CHANGES: dict[str, Any] = {"model": {**GPT, "dropout": 0.1}, "data": {"document_mask": True}}


def losses(layout: Layout, dtype: str, evaluates: bool) -> dict[str, Any]:
    """On a rank: two steps with evaluations around them (or none)."""
    from megastab.data.batches import Evaluation

    job = jobs.start(config_of(layout, "SGD", dtype, **CHANGES))
    samples, cp = job.grid.samples, job.grid.cp
    data = Evaluation(SyntheticSource(), SAMPLES, job.config.micro_batch, samples.rank, samples.size, True, cp.rank, cp.size)
    valid, train = [], []
    for _ in range(3):
        if evaluates:
            valid += [job.stepper.evaluate(data), job.stepper.evaluate(data)]
        train.append(job.step())
    return {"valid": valid, "train": train, "norm": job.norm}


@functools.cache
def single() -> dict[str, Any]:
    return run_ranks(1, losses, SINGLE, "fp32", True)[0]


LAYOUTS = [
    Layout(1, accumulation=4),
    Layout(2),
    Layout(2, tp=2, sp=True),
    Layout(2, pp=2, accumulation=3),
    Layout(2, zero=3),
    Layout(4, tp=2, pp=2, sp=True, accumulation=2),
    Layout(4, pp=2, zero=1, accumulation=2),
    Layout(2, cp=2),
    Layout(4, cp=2, zero=1),
    Layout(4, cp=2, pp=2, accumulation=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_evaluation_is_one_number_at_every_layout(layout: Layout) -> None:
    """2e-6 as in the equivalence matrix."""
    ranks = run_ranks(layout.world, losses, layout, "fp32", True)
    for rank in ranks:
        assert rank["valid"] == ranks[0]["valid"]
        assert rank["valid"] == pytest.approx(single()["valid"], rel=2e-6)
        assert rank["train"] == pytest.approx(single()["train"], rel=2e-6)


def test_evaluation_repeats_exactly_and_follows_training() -> None:
    valid = single()["valid"]
    assert valid[0::2] == valid[1::2] and len(set(valid)) == 3


@pytest.mark.parametrize("layout", [SINGLE, Layout(2, pp=2, accumulation=3), Layout(2, zero=3)], ids=str)
def test_evaluation_leaves_training_alone(layout: Layout) -> None:
    with_, without = (run_ranks(layout.world, losses, layout, "fp32", evaluates)[0] for evaluates in (True, False))
    assert with_["train"] == without["train"] and with_["norm"] == without["norm"]


def mean_by_hand() -> tuple[float, float, float]:
    """On one rank: the stepper's mean over real targets, and torch's over the same ones, and the loss of no samples."""
    import torch

    from megastab.data.batches import Evaluation, assemble

    job = jobs.start(config_of(SINGLE, "SGD", **CHANGES))
    found = job.stepper.evaluate(Evaluation(SyntheticSource(), SAMPLES, 12, 0, 1, True))
    whole = assemble(SyntheticSource(), 0, SAMPLES, True)
    module = job.built.engine.module.eval()
    with torch.no_grad():
        loss = module(whole.tokens, whole.labels, whole.weights, None, whole.document_ids)
    return found, float(loss / whole.weights.sum()), job.stepper.evaluate([])


def test_evaluation_is_the_mean_over_targets() -> None:
    found, expected, nothing = run_ranks(1, mean_by_hand)[0]
    assert found == pytest.approx(expected, rel=1e-6) and nothing != nothing


def stopped_after(config: dict[str, Any], looks: int) -> tuple[float | None, float | None, int]:
    """On a rank: an evaluation that is told to stop at its ``looks``-th look, one that is not, and how often the latter looked."""
    from megastab.data.batches import evaluation_batches
    from tests import jobs
    from tests.layouts import SyntheticSource

    job, seen = jobs.start(config), []

    def goes_on() -> bool:
        seen.append(True)
        return len(seen) < looks

    sizes = {"micro_batch": job.config.micro_batch, "dp_rank": job.grid.dp.rank, "dp_size": job.grid.dp.size, "document_mask": False}
    batches = evaluation_batches(SyntheticSource(), 240, **sizes)
    whole, counted = job.stepper.evaluate(batches), []
    stopped = job.stepper.evaluate(batches, goes_on)
    again = job.stepper.evaluate(batches, lambda: counted.append(True) is None)
    assert again == whole and job.stepper.engine.training
    job.step()  # the engine is fit for training
    return stopped, again, len(counted)


@pytest.mark.parametrize(("layout", "looks"), [(Layout(2), 20), (Layout(2, pp=2, accumulation=12), 8)], ids=["dp2", "pp2"])
def test_an_evaluation_can_be_left_at_every_look(layout: Layout, looks: int) -> None:
    ranks = run_ranks(layout.world, stopped_after, config_of(layout), 3)
    (single,) = run_ranks(1, stopped_after, config_of(Layout(1)), 3)
    for stopped, loss, counted in ranks:
        assert stopped is None and counted == looks and loss == pytest.approx(single[1], rel=2e-6)
