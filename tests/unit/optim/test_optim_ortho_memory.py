"""What OrthoAdam holds beyond AdamW: under 1 % of the moments for good, and in a step nothing that grows with a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megastab.optim import row_op
from megastab.optim.ortho_adam import OrthoAdam
from megastab.optim.rotation import BLOCK_ELEMENTS
from tests import jobs
from tests.layouts import LLAMA, Layout, config_of
from tests.memory import PeakOfTensors
from tests.ranks import run_ranks

MODEL = {**LLAMA, "hidden_size": 192, "ffn_hidden_size": 512}  # rows of 3 * 64: odd factors, and partitions that cut rows


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor reachable through containers and objects of this package."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each, seen)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_in(each, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value), seen)


def extra_bytes(client: OrthoAdam) -> int:
    """Held by the optimizer and its plans, besides weights and moments."""
    held = {name: value for name, value in vars(client).items() if name not in ("state", "param_groups", "_own")}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(held, set())}
    return sum(storages.values())


def held(layout: Layout, dtype: str, params: dict[str, Any]) -> tuple[int, int, int]:
    """On a rank: extra bytes, bytes of the moments, and what the plans say they hold for cut rows."""
    job = jobs.start(config_of(layout, "OrthoAdam", dtype, model=MODEL, ds__optimizer__params=params))
    job.step()
    wrapper = job.built.engine.optimizer
    client = getattr(wrapper, "optimizer", wrapper)
    moments = sum(8 * state["exp_avg"].numel() for state in client.state.values())
    return extra_bytes(client), moments, sum(plan.cuts.num_bytes for plan in client.plans.values() if plan.cuts is not None)


@pytest.mark.parametrize(
    ("layout", "dtype", "share"),
    [
        (Layout(2), "fp32", 0.01),
        (Layout(2, zero=1), "fp32", 0.01),
        (Layout(2, zero=2), "fp32", 0.01),
        (Layout(2, zero=1), "bf16", 0.01),
        # Rows and names on every rank: what is held does not shrink with the ranks as the moments do, and is printed.
        (Layout(3, zero=3), "fp32", 0.06),
    ],
    ids=str,
)
def test_what_is_held_besides_the_moments(layout: Layout, dtype: str, share: float) -> None:
    for extra, moments, _ in run_ranks(layout.world, held, layout, dtype, {"rotation": "hadamard"}):
        assert 0 < extra < share * moments, (extra, moments, extra / moments)


@pytest.mark.parametrize(("axes", "op", "whole"), [("last", "1", 0), ("last", "0", 0), ("both", "0", 2)])
def test_a_step_holds_blocks_or_one_matrix(axes: Any, op: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(row_op.SWITCH, op)
    shapes = [(2048, 512), (1024, 512), (3, 512), (600_000,)]
    pairs = [(f"p{place}", nn.Parameter(torch.zeros(shape))) for place, shape in enumerate(shapes)]
    optimizer = OrthoAdam(pairs, axes=axes)
    for _ in range(2):  # the first makes moments and rotations
        for _, parameter in pairs:
            parameter.grad = torch.ones_like(parameter)
        with PeakOfTensors() as counted:
            optimizer.step()
    largest = 4 * 2048 * 512
    assert whole * largest <= counted.peak <= whole * largest + BLOCK_ELEMENTS, counted.peak  # workspaces are kept from step to step
