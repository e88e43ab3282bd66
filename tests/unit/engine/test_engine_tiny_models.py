"""A model with fewer weights than ranks: some ranks own nothing of it, count nothing, and must still take part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megastab.config.errors import UserError
from tests.ranks import run_ranks

RANKS = 3
CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


class Tiny(nn.Module):
    """Two weights and a bias under names whose roles are known."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(2, 1), "down_proj": nn.Linear(1, 1, bias=False)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layers[0]
        return (layer["down_proj"](layer["up_proj"](x)) ** 2).mean()


def config_of(stage: int, dtype: str, scope: str) -> dict[str, Any]:
    stability = {
        "zclip": {"warmup_steps": 1, "z_thresh": 0.5, "alpha": 0.5, "scope": scope},
        "tvr": {"target_std": 0.05, "interval_steps": 2},
    }
    config: dict[str, Any] = {
        "train_batch_size": RANKS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "megastab": {"stability": stability},
    }
    return config if dtype == "fp32" else {**config, dtype: {"enabled": True}}


def train_all() -> dict[Any, list[tuple[Any, ...]]]:
    """On a rank: every case, five steps, the fourth with a gradient of zero."""
    import megastab

    seen = {}
    for stage, dtype in CASES:
        for scope in ("global", "parameter"):
            torch.manual_seed(0)
            engine, *_ = megastab.initialize(model=Tiny(), config=config_of(stage, dtype, scope))
            records = []
            for step in range(5):
                x = torch.ones(1, 2, device=engine.device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
                engine.backward(engine(x * (0.0 if step == 3 else 1.0 + step)) * (0.0 if step == 3 else 1.0))
                engine.step()
                last = engine.stability.last
                records.append((last.grad_norm, last.clip_scale, last.action, last.rescaled))
            seen[stage, dtype, scope] = records
            engine.destroy()
    return seen


def test_ranks_that_own_nothing_take_part() -> None:
    first, *others = run_ranks(RANKS, train_all)
    assert all(other == first for other in others)
    for (stage, dtype, scope), records in first.items():
        norms, scales, actions, rescaled = zip(*records, strict=True)
        assert actions[3] == "apply" and norms[3] == 0.0, (stage, dtype, scope)
        assert min(scales) < 1.0 and scales[0] == 1.0 and any(rescaled), (stage, dtype, scope)
        if dtype == "fp32":
            assert norms == pytest.approx([record[0] for record in first[0, "fp32", scope]], rel=1e-5)


def with_losses() -> tuple[list[float], list[str]]:
    """On a rank: 40 quiet steps and one whose loss jumps, told through ``read_loss``; the record's losses and what was logged."""
    import logging

    import megastab

    told: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megastab").addHandler(handler)
    logging.getLogger("megastab").setLevel(logging.INFO)
    config = {**config_of(1, "fp32", "global"), "megastab": {"stability": {"policy": {"rewind_after": 1}}}, "train_batch_size": 1}
    engine, *_ = megastab.initialize(model=Tiny(), config=config)
    losses = [2.0 + 0.01 * (step % 5) for step in range(40)] + [9.0]
    seen = []
    for loss in losses:
        engine.stability.read_loss = lambda loss=loss: loss
        engine.backward(engine(torch.ones(1, 2)))
        engine.step()
        seen.append(engine.stability.last.loss)
    assert seen == losses
    return seen, told


def test_a_loop_that_tells_its_loss_hears_of_outliers() -> None:
    _, told = run_ranks(1, with_losses)[0]
    assert sum("step 41: loss_spike: loss 9 is" in line for line in told) == 1
    assert any("1 bad steps in a row, from step 41: go back to a checkpoint" in line for line in told)
    assert not any("loss_spike" in line and "step 41" not in line for line in told)


def refused() -> str:
    import megastab

    config = {**config_of(1, "fp32", "global"), "megastab": {"stability": {"tvr": {"interval_tokens": 1000}}}}
    try:
        megastab.initialize(model=Tiny(), config={**config, "train_batch_size": 1})
    except UserError as error:
        return str(error)
    return ""


def test_what_only_the_trainer_can_carry_out_is_refused() -> None:
    said = run_ranks(1, refused)[0]
    assert "interval_tokens = 1000" in said and "interval_steps" in said
