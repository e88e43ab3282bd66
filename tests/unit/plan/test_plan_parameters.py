"""The plan's parameters against those a network is built of, for every norm and place of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megastab.config.load import load_config
from megastab.model.transformer import Transformer
from megastab.optim.groups import decays
from megastab.parallel.grid import TensorParallel
from megastab.plan.parameters import stages
from megastab.plan.plan import plan
from tests.layouts import GPT, LLAMA, NORM_VARIANTS, SINGLE, config_of

VARIANTS: dict[str, dict[str, Any]] = {"llama": {}, "gpt": GPT, **NORM_VARIANTS}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_planned_weights_are_the_built_ones(name: str, tensor: int) -> None:
    config = load_config(config_of(SINGLE, model=VARIANTS[name]), world_size=1)
    network = Transformer(config.megastab, TensorParallel(1, tensor, None, True) if tensor > 1 else TensorParallel(0, 1, None, False))
    (stage,) = stages(config.megastab.model, replace(config.layout, world=tensor, tensor=tensor))
    built = sorted((p.numel(), decays(p)) for p in network.parameters())
    assert sorted((weight.elements, weight.decays) for weight in stage.weights) == built


@pytest.mark.parametrize("name", VARIANTS)
def test_stages_of_a_pipeline_hold_every_weight_once(name: str) -> None:
    config = load_config(config_of(SINGLE, model={**LLAMA, **VARIANTS[name], "tie_embeddings": False}), world_size=1)
    model = config.megastab.model
    (whole,) = stages(model, config.layout)
    cut = stages(model, replace(config.layout, world=2, pipeline=2))
    assert sorted(weight.name for stage in cut for weight in stage.weights) == sorted(weight.name for weight in whole.weights)
    assert cut[0].has_embedding and cut[1].has_head and sum(stage.num_blocks for stage in cut) == model.num_layers
    assert plan(config).parameters == whole.elements
