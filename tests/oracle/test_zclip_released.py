"""``ZClip(compat=True)`` is the released package zclip 1.0.0: differences are exactly 0.0, decisions and statistics."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from zclip import ZClip as Released

from megastab.stability.zclip import ZClip

MODES: dict[str, dict[str, Any]] = {
    "reciprocal": {"mode": "zscore", "clip_option": "adaptive_scaling"},
    "mean": {"mode": "zscore", "clip_option": "mean"},
    "max": {"mode": "percentile"},
}
OPTIONS: list[dict[str, Any]] = [
    {"max_grad_norm": None},
    {"max_grad_norm": None, "skip_update_on_spike": True},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1.1, "clip_factor": 0.7, "alpha": 0.9, "z_thresh": 2.0},
    {"max_grad_norm": None, "clip_factor": 1.3, "warmup_steps": 1, "eps": 1e-3, "skip_update_on_spike": True},
]


def norms(count: int, seed: int) -> list[float]:
    """Skewed noise at a level that wanders over six decades, with spikes and zeros."""
    draw, level, out = random.Random(seed), 1.0, []
    for _ in range(count):
        level *= 10 ** draw.uniform(-6, 0) / level if draw.random() < 0.002 else 1.0
        spike = 10 ** draw.uniform(0.5, 4) if draw.random() < 0.03 else 1.0
        out.append(0.0 if draw.random() < 0.001 else level * spike * draw.lognormvariate(0.0, 0.2))
    return out


class OneNumber(torch.nn.Module):
    """A model whose gradient norm is what it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        self.weight.grad = torch.zeros(1, 1, dtype=torch.float64)

    def step(self, released: Released, gradient: float) -> tuple[float, float]:
        """The norm the package saw (torch's norm of one number may be off by a rounding) and the gradient it left."""
        assert self.weight.grad is not None
        self.weight.grad.fill_(gradient)
        return released.step(self), self.weight.grad.item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_compat_differs_by_nothing(mode: Any, options: dict[str, Any]) -> None:
    released, ours, model = Released(**MODES[mode], **options), ZClip(mode=mode, compat=True, **options), OneNumber()
    num_clipped = num_zeroed = 0
    for step, gradient in enumerate(norms(10_000, seed=len(mode))):
        is_warmup = not released.initialized
        norm, after = model.step(released, gradient)
        decision = ours.observe(norm)
        if decision.action == "skip":  # a threshold of zero: the package multiplies by it, we never do
            assert after == 0.0 < norm and decision.scale == 0.0
            num_zeroed += 1
        else:
            # In warm-up torch clips by its own norm, computed another way: two roundings.
            assert gradient * decision.scale == (pytest.approx(after, rel=5e-16) if is_warmup else after), step
        num_clipped += decision.action == "clip"
        assert (ours.mean, ours.var if released.initialized else None, ours.buffer) == (released.mean, released.var, released.buffer), step
    assert num_clipped > 100 and num_zeroed == 0
