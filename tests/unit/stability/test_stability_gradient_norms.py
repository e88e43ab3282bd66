"""Norms by matrix equal those of the gradients the optimizer is handed, in every wrapper; and a matrix is scaled alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from megastab.stability.gradient_norms import Share, top_shares
from tests import jobs
from tests.layouts import config_of
from tests.ranks import run_ranks
from tests.unit.wrappers import test_wrappers_adapters as wrapped_runs
from tests.unit.wrappers.test_wrappers_adapters import SMALL_SCALE, WRAPPED

HALVED, SHRUNK = "layers.1.attention.k", "embedding"
FACTORS = {HALVED: 0.5, SHRUNK: 1e-3}


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: two steps, the second with two matrices scaled, and a bad one; what was told and what the optimizer was handed."""
    wrapped_runs.scale_losses()
    wrapped_runs.set_factor(1.0)
    job = jobs.start(config)
    tap, controller = jobs.GradientTap(job), job.built.controller
    told: list[dict[str, float]] = []
    by_layer: list[dict[str, float]] = []
    squares: list[dict[str, float]] = []

    def listen(norm: float) -> None:
        told.append(controller.norms.by_name(norm))
        by_layer.append(controller.norms.by_layer(norm))
        squares.append(controller.norms.squares())
        if len(told) == 2:
            controller.norms.scale_(FACTORS)

    job.built.adapter.on_norm(listen)
    out = []
    for _ in range(2):
        job.step()
        out.append((controller.norm, told[-1], squares[-1], tap.pieces()))
    scale = getattr(job.built.engine.optimizer, "loss_scale", 1.0) or 1.0
    tops = [controller.top]
    wrapped_runs.set_factor(0.0)
    job.step()
    nothing = (controller.norm, controller.decision.action, controller.norms.layers.keys() == told[-1].keys(), set(told[-1].values()))
    wrapped_runs.set_factor(math.inf)
    job.step()
    tops.append(controller.top)
    return {
        "steps": out,
        "loss_scale": float(scale),
        "layers": controller.norms.layers,
        "tops": tops,
        "nothing": nothing,
        "by_layer": by_layer[0],
    }


@functools.cache
def measured(name: str) -> list[dict[str, Any]]:
    wrapped = WRAPPED[name]
    small = SMALL_SCALE if wrapped.dtype == "fp16" else {}
    return run_ranks(wrapped.layout.world, measure, config_of(wrapped.layout, "AdamW", wrapped.dtype, **small))


def handed(name: str, step: int) -> dict[str, float]:
    whole, drift = jobs.merge(rank["steps"][step][3] for rank in measured(name))
    assert drift == 0.0
    return {matrix: float(np.linalg.norm(values.astype(np.float64))) for matrix, values in whole.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_norms_by_matrix_are_those_of_the_gradients_handed_on(name: str) -> None:
    for rank in measured(name):
        norm, told, _, _ = rank["steps"][0]
        assert told == measured(name)[0]["steps"][0][1]  # to the last bit on every rank
        assert math.sqrt(sum(each * each for each in told.values())) == pytest.approx(norm, rel=1e-12)
    # fp32 gradients; under low precision DeepSpeed forms its norm from copies rounded to 16 bits in some wrappers
    tolerance = 2e-6 if WRAPPED[name].dtype == "fp32" else 1e-3
    assert told == pytest.approx(handed(name, 0), rel=tolerance)


@pytest.mark.parametrize("name", WRAPPED)
def test_squares_add_up_to_the_global_norm(name: str) -> None:
    norm, _, squares, _ = measured(name)[0]["steps"][0]
    mine = math.sqrt(sum(squares.values())) / measured(name)[0]["loss_scale"]
    assert mine == pytest.approx(norm, rel=2e-6 if WRAPPED[name].dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_matrix_is_scaled_alone(name: str) -> None:
    before, after = measured(name)[0]["steps"][1][1], handed(name, 1)
    assert FACTORS.keys() <= before.keys()
    expected = {matrix: norm * FACTORS.get(matrix, 1.0) for matrix, norm in before.items()}
    assert after == pytest.approx(expected, rel=2e-6 if WRAPPED[name].dtype == "fp32" else 1e-3)


@pytest.mark.parametrize("name", WRAPPED)
def test_gradients_that_are_all_zero_are_an_ordinary_step(name: str) -> None:
    assert all(rank["nothing"] == (0.0, "apply", True, {0.0}) for rank in measured(name))


@pytest.mark.parametrize("name", WRAPPED)
def test_who_carried_a_bad_norm_is_known(name: str) -> None:
    for rank in measured(name):
        ordinary, bad = rank["tops"]
        assert ordinary == []  # nothing is reduced for an ordinary step
        if WRAPPED[name].dtype == "fp16":
            assert bad == []  # an overflow the loss scale answers is nobody's
        else:
            assert len(bad) == 5 and all(share.share is None for share in bad)


def test_norms_by_block_are_the_sums_of_their_matrices() -> None:
    for rank in measured("bf16-tp2-pp2"):
        _, told, _, _ = rank["steps"][0]
        blocks = rank["by_layer"]
        assert {"layers.0", "layers.1", "embedding", "final_norm", "head"} == blocks.keys()
        second = [norm for name, norm in told.items() if name.startswith("layers.1.")]
        assert len(second) == 9 and blocks["layers.1"] == pytest.approx(math.hypot(*second), rel=1e-12)


def test_every_matrix_has_its_block() -> None:
    layers = measured("plain-tp2-pp2")[0]["layers"]
    assert layers["embedding"] is None and layers["layers.0.attention.q"] == 0 and layers["layers.1.mlp.down"] == 1
    assert all(rank["layers"] == layers and list(rank["layers"]) == list(layers) for rank in measured("plain-tp2-pp2"))


def test_top_shares_put_what_is_not_finite_first() -> None:
    squares = {"a": 1.0, "b": 3.0, "c": math.nan, "d": 0.0, "e": math.inf}
    assert top_shares(squares) == [Share("c", None), Share("e", None), Share("b", 0.75), Share("a", 0.25)]
    assert [share.name for share in top_shares({str(i): float(i) for i in range(9)})] == ["8", "7", "6", "5", "4"]
