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


def messages() -> list[str]:
    """What megastab logs from here on."""
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megastab")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return said


def from_json(stage: int) -> dict[str, Any]:
    """On a rank: the optimizer of the JSON."""
    said = messages()
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


def told(stage: int, problem: str, axes: str = "last") -> tuple[str, str]:
    """On a rank: how binding ends, and what is said of the rotations."""
    import deepspeed

    from megastab.config.errors import UserError
    from megastab.parallel import collectives
    from megastab.parallel.collectives import PeerFailed

    model = nn.Linear(1001, 4) if problem == "width" else llama()
    pairs = list(model.named_parameters())
    kwargs: dict[str, Any] = {}
    if problem == "stranger":
        pairs.append(("temperature", nn.Parameter(torch.zeros(2, 8))))
    elif problem == "across":
        from megastab.parallel.grid import Grid

        kwargs["mpu"] = Grid.create(tensor=collectives.world()[1]).mpu()
        cut = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
        cut.tensor_model_parallel, cut.partition_dim = True, 1  # type: ignore[attr-defined]
    optimizer = OrthoAdam(pairs, **GIVEN, axes=axes)
    config = {**config_of(stage), **({"train_batch_size": 4} if problem == "across" else {})}
    said = messages()
    try:
        if problem == "stranger" and stage:
            megastab.initialize(model=model, optimizer=optimizer, config=config)  # DeepSpeed itself would fail with a KeyError
        else:
            megastab.attach(deepspeed.initialize(model=model, optimizer=optimizer, config=config, **kwargs)[0])
    except (UserError, PeerFailed) as error:
        return type(error).__name__, str(error)
    return "bound", "".join(said)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_parameter_outside_the_module_is_refused_once(stage: int) -> None:
    """Under ZeRO it lies in a partition nobody knows: it would never be updated."""
    (first, message), (second, _) = run_ranks(2, told, stage, "stranger")
    assert (first, second) == ("UserError", "PeerFailed")
    assert "parameter 21 [2, 8] is not in the engine's module and so has no name" in message, message


def test_width_that_cannot_be_rotated_is_refused_once() -> None:
    (first, message), (second, _) = run_ranks(2, told, 1, "width")
    assert (first, second) == ("UserError", "PeerFailed") and "weight has rows of 1001 = 1001 x 1" in message, message


def test_shares_cut_along_the_last_axis_are_named_or_refused() -> None:
    """Megatron marks them; rotated by shares a run depends on tp, and put together along the first axis they would be another matrix."""
    (kind, said), _ = run_ranks(2, told, 1, "across")
    assert kind == "bound" and "the run depends on tp: model.layers.0.self_attn.o_proj" in said, said
    (first, message), (second, _) = run_ranks(2, told, 1, "across", "both")
    assert (first, second) == ("UserError", "PeerFailed") and "cuts model.layers.0.self_attn.o_proj along the last axis" in message
