"""ZClip is free: against fixed clipping a step has the same collectives and no more kernels of gradient size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather", "reduce", "all_to_all_single")
LARGE = 3000  # elements: about the smallest matrix of the test model; the norm's blocks and scalars stay below


class Kernels(TorchDispatchMode):
    """Counts operators that touch a large tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(x, torch.Tensor)]
        if any(x.numel() >= LARGE for x in tensors):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def cost(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: what the fourth step calls and what was decided in it."""
    job = jobs.start(config)
    for _ in range(3):
        job.step()
    calls: Counter[str] = Counter()
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, counting(name))
    with Kernels() as kernels:
        job.step()
    return {"calls": dict(calls), "kernels": dict(kernels.seen), "action": job.decision.action, "scale": job.decision.scale}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout(2, zero=1), "fp32"),
        (Layout(2, zero=1), "bf16"),
        (Layout(2, zero=2), "bf16"),
        (Layout(2, zero=3), "bf16"),
        (Layout(2, pp=2, zero=1, accumulation=2), "bf16"),
    ],
    ids=["zero1", "bf16", "zero2", "zero3", "pp2"],
)
@pytest.mark.parametrize("is_binding", [False, True], ids=["idle", "clipping"])
def test_zclip_costs_what_fixed_clipping_costs(layout: Layout, dtype: str, is_binding: bool) -> None:
    cap = 1e-3 if is_binding else 1e6
    fixed = run_ranks(layout.world, cost, config_of(layout, "AdamW", dtype, ds__gradient_clipping=cap))
    # z_thresh so that every norm after warm-up is a spike, or none is.
    zclip = {"zclip": {"warmup_steps": 1, "z_thresh": 1e-6 if is_binding else 1e6, "rewarm_clipped": 0}}
    ours = run_ranks(layout.world, cost, config_of(layout, "AdamW", dtype, stability=zclip))
    for theirs, mine in zip(fixed, ours, strict=True):
        assert sum(theirs["calls"].values()) > 0 and mine["calls"] == theirs["calls"]
        assert sum(mine["kernels"].values()) <= sum(theirs["kernels"].values())
    assert {found["action"] for found in fixed} == {"clip" if is_binding else "apply"}
    if not is_binding:
        assert {found["action"] for found in ours} == {"apply"}
