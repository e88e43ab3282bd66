"""Going back in memory: the same engine takes the same steps again, bit for bit, from a snapshot that it leaves as it was."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest

from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

SCALED = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}
CASES: dict[str, tuple[Layout, str, str]] = {
    "plain": (Layout(2), "AdamW", "fp32"),
    "plain-sgd": (Layout(2), "SGD", "fp32"),
    "pp2": (Layout(2, pp=2, accumulation=2), "AdamW", "fp32"),
    "bf16": (Layout(2, zero=1), "AdamW", "bf16"),
    "bf16-ortho": (Layout(2, zero=1), "OrthoAdam", "bf16"),
    "zero1-fp16": (Layout(2, zero=1), "AdamW", "fp16"),
    "zero2-offload": (Layout(2, zero=2, offload=True), "AdamW", "bf16"),
    "zero3-fp16": (Layout(2, zero=3), "OrthoAdam", "fp16"),
    "zero3-offload": (Layout(2, zero=3, offload=True), "AdamW", "bf16"),
}


def seen(job: jobs.Job, losses: list[float]) -> dict[str, Any]:
    from megastab.wrappers.states import OptimizerState, scalar_state

    state, adapter = OptimizerState(job.built.adapter), job.built.adapter
    tensors = [piece[3] for piece in jobs.masters(job)]
    for fragment in adapter.fragments():
        tensors += [jobs.piece(fragment, values)[3] for _, values in sorted(state.tensors(fragment).items())]
    rates = [group["lr"] for group in job.built.engine.optimizer.param_groups]
    steps = [state.scalars(fragment) for fragment in adapter.fragments()]
    return {"losses": losses, "tensors": tensors, "rates": rates, "steps": steps, "scalars": scalar_state(adapter)}


def twice(name: str) -> list[list[dict[str, Any]]]:
    """On a rank: steps from a snapshot and the same steps again, from before the first step and from after the second."""
    from megastab.checkpoint.fragments import restore, snapshot

    layout, optimizer, dtype = CASES[name]
    job = jobs.start(config_of(layout, optimizer, dtype, model__num_kv_heads=2, **({"ds__fp16": SCALED} if dtype == "fp16" else {})))
    out = []
    for _ in range(2):
        consumed, kept = job.batches.consumed, snapshot(job.built.adapter)
        whole = copy.deepcopy(kept)
        found = []
        for attempt in range(3):
            if attempt:
                restore(job.built.adapter, kept)
                job.batches.consumed = consumed
            found.append(seen(job, [job.step() for _ in range(3)]))
        restore(job.built.adapter, whole)
        job.batches.consumed = consumed
        found.append(seen(job, [job.step() for _ in range(3)]))
        out.append(found)
    job.built.engine.destroy()
    return out


def all_cases() -> dict[str, Any]:
    return {name: twice(name) for name in CASES}


@functools.cache
def found_by_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, all_cases, timeout=400)


@pytest.mark.parametrize("name", CASES)
def test_steps_from_a_snapshot_are_taken_again_exactly(name: str) -> None:
    for rank in found_by_ranks():
        for first, *others in rank[name]:
            assert len(set(first["losses"])) == 3 and first["scalars"]["global_steps"] % 3 == 0
            for other in others:
                assert {**other, "tensors": None} == {**first, "tensors": None}
                assert all(np.array_equal(a, b) for a, b in zip(other["tensors"], first["tensors"], strict=True))
