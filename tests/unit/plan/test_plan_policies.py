"""Policies of recompute side by side: what the plan says of each against the tensors a step holds at its worst."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megastab.config.config import Config
from megastab.model.init import init_weights
from megastab.model.transformer import Transformer
from megastab.parallel.grid import ALONE
from megastab.plan.plan import plan
from megastab.plan.policies import with_recompute
from megastab.plan.text import render
from tests.memory import PeakOfTensors
from tests.unit.plan.jobs import small_config

# Many tokens for the width: a weight's gradient, which lives for a moment beside the activations and is no part of them, stays small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, deep, shared KV heads": ("llama", {"num_layers": 9, "hidden_size": 96, "num_heads": 6, "max_seq_len": 192}),
    "gpt, wide MLP, gates": ("gpt", {"num_layers": 6, "ffn_hidden_size": 448, "max_seq_len": 256, "output_gate": "element"}),
}


def peak_of_a_step(config: Config) -> int:
    """Bytes of the tensors that forward and backward make and hold at once; gradients are there before."""
    model = Transformer(config.megastab, ALONE)
    init_weights(model, config.megastab.model, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    shape = (config.micro_batch, config.megastab.model.max_seq_len)
    tokens = torch.randint(0, 500, shape)
    weights, samples = torch.ones(shape), torch.arange(shape[0])
    with PeakOfTensors() as seen:
        model(tokens, tokens, weights, samples).backward()
    return seen.peak


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_of_each_policy_is_the_planned_one(name: str) -> None:
    arch, model = MODELS[name]
    config = small_config(1, arch, model)
    measured = {made.name: peak_of_a_step(with_recompute(config, made.name)) for made in plan(config).policies}
    planned = {made.name: made.peak for made in plan(config).policies}
    assert planned["none"] > planned["selective"] > planned["full"]
    # Within 6 % when measured; what is left is what lies between two operations of a block computed again.
    assert planned == {name: pytest.approx(held, rel=0.1) for name, held in measured.items()}


def test_what_is_computed_again() -> None:
    config = small_config(4, parallel={"pipeline": 2, "tensor": 2, "recompute": "selective"})
    none, selective, full = plan(config).policies
    assert none.more_compute == 0.0 and 0.0 < selective.more_compute < full.more_compute < 1 / 3  # the head is never done again
    assert [made.name for made in (none, selective, full)] == ["none", "selective", "full"]
    page = render(plan(config))
    assert "selective (this)" in page and f"{100 * full.more_compute:.1f} %" in page
    alone = plan(with_recompute(config, "full"))
    assert max(stage.activations.peak for stage in alone.stages) == full.peak
    assert alone.policies == plan(config).policies
