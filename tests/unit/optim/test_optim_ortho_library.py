"""OrthoAdam in the library form: anyone's model, in the JSON or as an object, bound by initialize or attach, refused where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import megastab
from megastab.optim.ortho_adam import OrthoAdam
from tests import jobs
from tests.ranks import run_ranks
from tests.unit.engine.test_engine_library import batch_of, llama, masters

PARAMS: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "seed": 2}
GIVEN = {**PARAMS, "betas": tuple(PARAMS["betas"])}
STEPS = 5


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
    return {**config, "zero_allow_untested_optimizer": True, **more}


def train(engine: Any) -> dict[str, np.ndarray]:
    for step in range(1, STEPS + 1):
        tokens = batch_of(step)[:8].chunk(2)[engine.global_rank]
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return masters(engine)


def as_pairs(model: nn.Module) -> list[dict[str, Any]]:
    """The caller's own groups: decay for matrices alone."""
    named = list(model.named_parameters())
    matrices, vectors = [pair for pair in named if pair[1].ndim > 1], [pair for pair in named if pair[1].ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def plain_loop() -> dict[str, np.ndarray]:
    """One process, an ordinary torch loop."""
    model = llama()
    optimizer = OrthoAdam(as_pairs(model), **GIVEN)
    for step in range(1, STEPS + 1):
        tokens = batch_of(step)[:8]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return {name.removesuffix(".weight"): p.detach().flatten().numpy().copy() for name, p in model.named_parameters()}


def from_json(stage: int) -> dict[str, Any]:
    """On a rank: the optimizer of the JSON."""
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megastab")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    engine, *_ = megastab.initialize(model=llama(), config=config_of(stage, optimizer={"type": "OrthoAdam", "params": PARAMS}))
    return {"masters": train(engine), "said": [line for line in said if line.startswith("OrthoAdam")]}


def attached(stage: int) -> dict[str, Any]:
    """On a rank: an engine somebody else built with OrthoAdam; it refuses to step until it is attached."""
    import deepspeed

    model = llama()
    engine, *_ = deepspeed.initialize(model=model, optimizer=OrthoAdam(as_pairs(model), **GIVEN), config=config_of(stage))
    refused = ""
    tokens = batch_of(1)[:8].chunk(2)[engine.global_rank]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    try:
        engine.step()
    except RuntimeError as error:
        refused = str(error)
    engine.destroy()
    model = llama()
    engine, *_ = deepspeed.initialize(model=model, optimizer=OrthoAdam(as_pairs(model), **GIVEN), config=config_of(stage))
    megastab.attach(engine)
    return {"masters": train(engine), "refused": refused}


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    return plain_loop()


def assert_close(ranks: list[dict[str, Any]], alone: dict[str, np.ndarray]) -> None:
    """1e-4 of the largest entry: the tolerance of the equivalence matrix."""
    whole, drift = jobs.merge([(name.removesuffix(".weight"), *rest) for name, *rest in rank["masters"]] for rank in ranks)
    assert drift == 0.0 and whole.keys() == alone.keys()
    for name, values in whole.items():
        assert np.abs(values - alone[name]).max() <= 1e-4 * np.abs(alone[name]).max(), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_json_form_is_the_plain_loop(stage: int, alone: dict[str, np.ndarray]) -> None:
    ranks = run_ranks(2, from_json, stage)
    assert_close(ranks, alone)
    (said,), others = ranks[0]["said"], ranks[1]["said"]
    assert not others and said.startswith("OrthoAdam: 16 matrices, ") and "rows of 32, 64" in said
    assert said.endswith("so that another axis is rotated: model.layers.*.self_attn.o_proj (2), model.layers.*.mlp.down_proj (2)")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_unbound_it_refuses_partitions_and_attach_binds_it(stage: int, alone: dict[str, np.ndarray]) -> None:
    ranks = run_ranks(2, attached, stage)
    assert all("call megastab.attach(engine) before the first step" in rank["refused"] for rank in ranks)
    assert_close(ranks, alone)
