"""What telemetry tells of every matrix is its definition, at every layout and in every wrapper, from masters and gradients as they are.

The definitions are taken in fp64 from the same masters, merged over the ranks. Tolerances: blocks of 4096 are summed in fp32 (3e-7), a
change is a difference of fp32 numbers, exact where the two are near; gradients were handed to the optimizer in fp32 after one more
rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from megastab.config.schema_telemetry import TelemetryConfig
from megastab.telemetry import weights
from megastab.telemetry.weights import Matrix
from tests import jobs
from tests.layouts import GPT, Layout, config_of
from tests.ranks import run_ranks

TVR = {"stability": {"tvr": {"target_std": 0.09, "interval_steps": 3, "exclude": ["k"]}}}
CELLS: dict[str, dict[str, Any]] = {
    "single": config_of(Layout(1, accumulation=2)),
    "tvr": config_of(Layout(1), **TVR),
    "tp2-gpt": config_of(Layout(2, tp=2), model=GPT),
    "pp2-tied": config_of(Layout(2, pp=2, accumulation=2), model={"tie_embeddings": True}),
    "dp2": config_of(Layout(2)),
    "zero1-bf16": config_of(Layout(2, zero=1), dtype="bf16"),
    "zero2-offload": config_of(Layout(2, zero=2, offload=True)),
    "zero3": config_of(Layout(2, zero=3)),
    "zero1-fp16": config_of(Layout(2, zero=1), dtype="fp16", ds__fp16={"enabled": True, "loss_scale": 256}),
    "tp2-pp2-sp-mqa": config_of(Layout(4, tp=2, pp=2, sp=True, accumulation=2), model={"num_kv_heads": 1}),
    "cp2": config_of(Layout(2, cp=2), model={"num_kv_heads": 1}),
}
ALL = TelemetryConfig(interval_steps=1, activations=False, attention=False)


def world_of(name: str) -> int:
    parallel = CELLS[name]["megastab"]["parallel"]
    return 1 if name in ("single", "tvr") else max(2, parallel["tensor"] * parallel["pipeline"])


def measure(names: list[str], kept: int | None) -> list[dict[str, Any]]:
    """On a rank: one ordinary step and one sampled one of each cell."""
    from megastab.telemetry.sampler import Sampler

    if kept is not None:
        weights.KEPT_ELEMENTS = kept  # type: ignore[misc]
    found = []
    for name in names:
        job = jobs.start(CELLS[name])
        sampler, tap = Sampler(ALL, job.built.controller, 2), jobs.GradientTap(job)
        job.step()
        job.built.controller.step_done()
        before, batches = jobs.masters(job), job.batches.next_step()
        with sampler.looking(2, batches):
            job.stepper.train(batches)
        found.append({"before": before, "after": jobs.masters(job), "gradients": tap.pieces(), "sample": sampler.finish()})
        found[-1]["norm"] = job.norm
        job.built.engine.destroy()
    return found


@functools.cache
def runs(world: int, kept: int | None = None) -> dict[str, list[dict[str, Any]]]:
    names = [name for name in CELLS if world_of(name) == world]
    ranks = run_ranks(world, measure, names, kept)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kept", [None, 100])
def test_every_number_is_its_definition(name: str, kept: int | None) -> None:
    ranks = runs(world_of(name), kept)[name]
    told = ranks[0]["sample"].weights
    assert all(list(rank["sample"].weights) == list(told) for rank in ranks)
    before, after, gradients = (jobs.merge(rank[key] for rank in ranks)[0] for key in ("before", "after", "gradients"))
    total = sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values())
    assert math.sqrt(total) == pytest.approx(ranks[0]["norm"], rel=1e-5), "the tap sees what was not clipped"
    assert set(told) == {n for n in after if "norm" not in n and not n.endswith(".bias")}, "all matrices and no vectors"
    for matrix, seen in told.items():
        old, new, gradient = (whole[matrix].astype(np.float64) for whole in (before, after, gradients))
        assert seen.std == pytest.approx(new.std(ddof=1), rel=1e-6)
        assert seen.mean == pytest.approx(new.mean(), abs=1e-6 * new.std())
        width = 32
        stride = Matrix("q", 0, len(new), width).stride if kept is None else strides(len(new), width, kept)
        assert (stride == 1) is (kept is None or len(new) < 3 * kept)
        chosen = slice(None, None, stride)
        ratio = np.linalg.norm((new - old)[chosen]) / np.linalg.norm(old[chosen])
        assert ratio > 1e-4 and seen.update_ratio == pytest.approx(ratio, rel=1e-5)
        assert seen.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        assert seen.gradient_share == pytest.approx((gradient**2).sum() / total, rel=1e-5)
        if name == "tvr" and "layers" in matrix and not matrix.endswith(".k"):
            assert seen.std_over_target == pytest.approx(new.std(ddof=1) / 0.09, rel=1e-6)
        else:
            assert math.isnan(seen.std_over_target)


def strides(elements: int, width: int, kept: int) -> int:
    """The largest stride that leaves ``kept`` elements and has no factor in common with the width."""
    return max(s for s in range(1, max(1, elements // kept) + 1) if math.gcd(s, width) == 1)


@pytest.mark.parametrize(
    ("elements", "width"), [(50304 * 4096, 4096), (5440 * 2048, 2048), (768 * 768, 768), (100, 10), (1 << 17, 1), (196576, 32)]
)
def test_the_choice_leaves_no_channel_out_and_is_small(elements: int, width: int) -> None:
    stride = Matrix("q", 0, elements, width).stride
    chosen = len(range(0, elements, stride))
    assert min(elements, weights.KEPT_ELEMENTS) <= chosen <= 3 * weights.KEPT_ELEMENTS
    if elements // stride >= width:
        assert {i * stride % width for i in range(width)} == set(range(width))


def skipped() -> list[Any]:
    """A step whose norm is not finite, then a good one."""
    import torch

    from megastab.telemetry.sampler import Sampler

    job = jobs.start(config_of(Layout(1)))
    sampler, found = Sampler(ALL, job.built.controller, 2), []
    for is_bad in (True, False):
        batches = job.batches.next_step()
        handle = job.built.engine.head.register_forward_hook(lambda _, __, y: y * torch.inf) if is_bad else None
        with sampler.looking(1, batches):
            job.stepper.train(batches)
        found.append(sampler.finish())
        if handle is not None:
            handle.remove()
    return [{"line": sample.to_json(), "tags": sample.by_tag()} for sample in found]


def test_a_skipped_step_moves_nothing_and_its_line_is_json() -> None:
    ((bad, good),) = run_ranks(1, skipped)
    assert {seen["update_ratio"] for seen in bad["line"]["weights"]} == {0.0}
    assert {seen["gradient_norm"] for seen in bad["line"]["weights"]} == {None} and "matrix_gradient_norm" not in bad["tags"]
    assert all(seen["update_ratio"] > 0 and seen["gradient_norm"] > 0 for seen in good["line"]["weights"])


def scoped() -> list[tuple[dict[str, float], dict[str, float], Any]]:
    """Steps of a rule that scales gradients matrix by matrix: squared norms before and after it did, and what was told."""
    from megastab.telemetry.sampler import Sampler

    rule = {"zclip": {"scope": "parameter", "warmup_steps": 2, "z_thresh": 0.1, "alpha": 0.5}}
    job = jobs.start(config_of(Layout(1), stability=rule))
    sampler, squares = Sampler(ALL, job.built.controller, 2), list[dict[str, float]]()
    for is_first in (True, False):
        job.built.adapter.on_norm(lambda norm: squares.append(job.built.controller.norms.squares()), first=is_first)
    found = []
    for step in range(1, 9):
        squares.clear()
        batches = job.batches.next_step()
        with sampler.looking(step, batches):
            job.stepper.train(batches)
        found.append((*squares, sampler.finish()))
    return found


def test_gradients_are_told_before_a_rule_scales_them() -> None:
    ((steps),) = run_ranks(1, scoped)
    assert any(before != after for before, after, _ in steps), "the rule scales some"
    for before, _, sample in steps:
        expected = {name: before[name] / sum(before.values()) for name in sample.weights}
        assert {name: seen.gradient_share for name, seen in sample.weights.items()} == pytest.approx(expected)
