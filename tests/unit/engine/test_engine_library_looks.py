"""Looks at a foreign model's matrices: their numbers are their definitions, on the steps the JSON names, in every wrapper and a pipeline.

Tolerances as for the trainer's (tests/unit/telemetry/test_telemetry_weights.py): blocks of 4096 summed in fp32 (3e-7), differences of fp32
numbers; gradients are held against one process's, whose sums are in another order, to 1e-4 of the norm, and in bf16 (three digits, other
activations) to 5e-2.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import megastab
from megastab.telemetry.weights import WeightWatch
from tests import jobs
from tests.ranks import run_ranks
from tests.unit.engine.test_engine_library import BATCH, MATRICES, TVR, batch_of, config_of, llama, masters, take_step

LOOKS = {"interval_steps": 2}
CASES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]


def block(telemetry: dict[str, Any] | None = LOOKS) -> dict[str, Any]:
    stability = {"tvr": {**TVR, "target_std": 1.0, "interval_steps": 100}}
    return {"megastab": {"stability": stability} | ({} if telemetry is None else {"telemetry": telemetry})}


def looked(engine: Any, steps: int) -> list[dict[str, Any]]:
    """By step: masters before and after, the look and the norm."""
    found = []
    for step in range(1, steps + 1):
        before = masters(engine)
        record = take_step(engine, step)
        found.append({"before": before, "after": masters(engine), "sample": engine.stability.sample, "norm": record.grad_norm})
    return found


def cases(folder: str) -> dict[Any, Any]:
    facts: dict[Any, Any] = {}
    for stage, dtype in CASES:
        board = {"tensorboard": {"enabled": True, "output_path": folder, "job_name": f"{stage}"}}
        engine, *_ = megastab.initialize(model=llama(), config={**config_of(stage, dtype), **block(), **board})
        facts[stage, dtype] = looked(engine, 3)
        engine.destroy()
    return facts | {"attached": attached(), "none": without(), "failed": failed()}


def attached() -> Any:
    import deepspeed

    model = llama()
    config = {**config_of(1, "fp32"), "zero_allow_untested_optimizer": True, "megastab": None}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)
    megastab.attach(engine, block())
    found = looked(engine, 1)
    engine.destroy()
    return found[0]["sample"]


def without() -> tuple[Any, int]:
    """The look of a step nobody asked to look at, and how often matrices were read."""
    reads, table = Counter[str](), WeightWatch.table
    WeightWatch.table = lambda self: reads.update("x") or table(self)  # type: ignore[method-assign, func-returns-value]
    engine, *_ = megastab.initialize(model=llama(), config={**config_of(1, "fp32"), **block(None)})
    take_step(engine, 1)
    sample = engine.stability.sample
    engine.destroy()
    engine, *_ = megastab.initialize(model=llama(), config={**config_of(1, "fp32"), **block({"interval_steps": 4})})
    for step in range(1, 5):
        take_step(engine, step)
    engine.destroy()
    WeightWatch.table = table  # type: ignore[method-assign]
    return sample, reads["x"]


def failed() -> tuple[int, dict[str, float]]:
    """The look of a step after one whose gradient was not finite, which nothing updated."""
    engine, *_ = megastab.initialize(model=llama(), config={**config_of(1, "fp32"), **block({"interval_steps": 1})})
    take_step(engine, 1, math.nan)
    skipped = {name: seen.update_ratio for name, seen in engine.stability.sample.weights.items()}
    take_step(engine, 2)
    moved = min(seen.update_ratio for seen in engine.stability.sample.weights.values())
    engine.destroy()
    return engine.stability.sample.step, {"most skipped": max(skipped.values()), "least moved": moved}


def pipelined() -> dict[str, Any]:
    """Two stages of somebody's layers: each knows its own, the look knows both."""
    from deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(4)]
    plain, draw = nn.Sequential(*copy.deepcopy(layers)), torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 8, generator=draw), torch.randn(4, 8, generator=draw)) for _ in range(2)]
    for x, y in batches:
        (nn.functional.mse_loss(plain(x), y) / 2).backward()
    config: dict[str, Any] = {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH // 2}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1e-9}}, "megastab": {"telemetry": {"interval_steps": 1}}}
    engine, *_ = megastab.initialize(model=PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss), config=config)
    engine.train_batch(iter(batches))
    seen = [(seen.std, seen.gradient_norm) for seen in engine.stability.sample.weights.values()]
    return {"seen": seen, "plain": [(float(layer.weight.std()), float(layer.weight.grad.norm())) for layer in plain]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("looks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    return run_ranks(2, cases, str(folder))


def gradients_of(step: int) -> dict[str, np.ndarray]:
    """Of one process that has taken no step before."""
    model, tokens = llama(), batch_of(step)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name.removesuffix(".weight"): p.grad.flatten().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def test_every_number_is_its_definition(ranks: list[dict[Any, Any]], case: Any) -> None:
    samples = [[step["sample"].step for step in rank[case]] for rank in ranks]
    assert samples == [[1, 2, 2]] * 2, "the first step and every second"
    for step in (0, 1):
        told = ranks[0][case][step]["sample"].weights
        assert ranks[1][case][step]["sample"].weights.keys() == told.keys() and len(told) == MATRICES + 2
        before, after = (jobs.merge(rank[case][step][key] for rank in ranks)[0] for key in ("before", "after"))
        for name, seen in told.items():
            old, new = (whole[name].astype(np.float64) for whole in (before, after))
            assert seen.std == pytest.approx(new.std(ddof=1), rel=1e-6) and seen.mean == pytest.approx(new.mean(), abs=1e-6 * new.std())
            assert seen.update_ratio > 1e-4
            assert seen.update_ratio == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5)
            is_targeted = name.endswith("_proj")
            assert seen.std_over_target == pytest.approx(seen.std) if is_targeted else math.isnan(seen.std_over_target)
    expected, norm = gradients_of(1), ranks[0][case][0]["norm"]
    for name, seen in ranks[0][case][0]["sample"].weights.items():
        wanted = float(np.linalg.norm(expected[name].astype(np.float64)))
        assert seen.gradient_norm == pytest.approx(wanted, abs=(1e-4 if case[1] == "fp32" else 5e-2) * norm), name
        assert seen.gradient_share == pytest.approx((seen.gradient_norm / norm) ** 2, rel=1e-5)


def test_what_was_seen_goes_to_the_monitors(ranks: list[dict[Any, Any]], folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(folder / "2")).Reload()
    name = "model.layers.1.mlp.up_proj"
    sent = {each.step: each.value for each in told.Scalars(f"weights/update_ratio/{name}")}
    seen = [step["sample"].weights[name].update_ratio for step in ranks[0][2, "fp32"]]
    assert sent == pytest.approx({1: seen[0], 2: seen[1]})


def test_an_attached_engine_is_looked_at(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank["attached"].step == 1 and len(rank["attached"].weights) == MATRICES + 2
        assert min(seen.update_ratio for seen in rank["attached"].weights.values()) > 1e-4


def test_nobody_asked_nothing_read(ranks: list[dict[Any, Any]]) -> None:
    assert [rank["none"] for rank in ranks] == [(None, 2)] * 2, "two looks in four steps, and none without the section"


def test_a_skipped_step_moves_nothing(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        step, ratios = rank["failed"]
        assert step == 2 and ratios["most skipped"] == 0.0 < 1e-4 < ratios["least moved"]


def test_a_foreign_pipeline_is_one_model() -> None:
    for rank in run_ranks(2, pipelined):
        assert np.array(rank["seen"]) == pytest.approx(np.array(rank["plain"]), rel=1e-5) and len(rank["seen"]) == 4
