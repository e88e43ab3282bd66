"""The plan's bytes against engines that hold them.

Everything is counted from the same shapes, so that the numbers agree to a few hundred bytes of alignment; 1 % is asked of models whose
alignment is larger than that of any real one.
"""

from __future__ import annotations

from typing import Any

import pytest

from megastab.plan.parameters import stages
from megastab.plan.plan import plan
from megastab.plan.states import _copied_to_reduce
from tests.ranks import run_ranks
from tests.unit.plan.jobs import measure_engine, measure_engines, small_config

BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def cut(tensor: int = 1, pipeline: int = 1, sequence: bool = False, context: int = 1) -> dict[str, Any]:
    return {"parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "context": context}}


CASES = {
    "fp32-gpt-tied-pp2": (2, {"arch": "gpt", **cut(pipeline=2)}),
    "fp32-shared-kv-tp4": (4, cut(tensor=4)),
    "fp32-zero1-dp2-sgd-momentum": (2, {**zero(1), "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}}),
    "fp16-zero1-dp2": (2, {**FP16, **zero(1)}),
    "bf16-zero1-dp2": (2, {**BF16, **zero(1)}),
    "bf16-zero1-tp2-pp2": (4, {**BF16, **zero(1), **cut(2, 2)}),
    "bf16-zero2-dp2": (2, {**BF16, **zero(2)}),
    "fp32-shared-kv-tp4-sink-norm-gate": (4, {"model": {"sink": "kv_bias", "qk_norm": "full", "output_gate": "element"}, **cut(tensor=4)}),
    "bf16-zero1-tp2-gpt-sink-norm-gate": (
        2,
        {"arch": "gpt", "model": {"sink": "learned", "qk_norm": "head", "output_gate": "head"}, **BF16, **zero(1), **cut(2)},
    ),
    "bf16-zero3-dp2": (2, {**BF16, **zero(3, stage3_param_persistence_threshold=5000)}),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_what_the_engine_holds(case: str) -> None:
    world, arguments = CASES[case]
    config = small_config(world, **arguments)
    planned = plan(config)
    cuts = stages(config.megastab.model, config.layout)
    for measured in run_ranks(world, measure_engine, arguments):
        stage = planned.stages[measured["stage"]]
        assert planned.wrapper.startswith(measured["wrapper"]) or (measured["wrapper"], planned.zero_stage) == ("AdamW", 0)
        assert measured["bounds"] in (None, [0, *(cut.stop for cut in cuts)])
        assert stage.parameters == measured["parameters"]
        for what in ("weights", "gradients", "masters", "moments"):
            assert getattr(stage.states, what) == pytest.approx(measured[what], rel=0.01), what


BUCKET = {"reduce_bucket_size": 500_000}
KEEPING = {"stage3_param_persistence_threshold": 5000, **BUCKET}
USED_APART = {**KEEPING, "reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
# Every wrapper and width, alone and beside copies of the model. Engines of one job, so that it starts once.
BUFFERED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "none": {},
        "none, alone": cut(2),
        "bf16": {**BF16, **zero(1)},
        "zero1": zero(1, **BUCKET),
        "zero1 fp16": {**FP16, **zero(1, **BUCKET)},
        "zero1 fp16, alone": {**FP16, **zero(1, **BUCKET), **cut(2)},
        "zero1, stages alone": {**zero(1, **BUCKET), **cut(pipeline=2)},
        "zero2": zero(2, **BUCKET),
        "zero2, alone": {**zero(2, **BUCKET), **cut(2)},
        "zero2 bf16": {**BF16, **zero(2, **BUCKET)},
        "zero2 bf16 overlapping": {**BF16, **zero(2, overlap_comm=True, **BUCKET)},
        "zero3": zero(3, **KEEPING),
        "zero3 bf16": {**BF16, **zero(3, **USED_APART), "model": {"ffn_hidden_size": 512}},
        "zero3 alone": {**BF16, **zero(3, **BUCKET), **cut(2)},
        "zero3, bucket below a matrix": {**BF16, **zero(3, reduce_bucket_size=20_000)},
        "bf16, shared sequences": {**BF16, **zero(1), **cut(context=2)},
        "zero3, shared sequences": {**zero(3, **KEEPING), **cut(context=2)},
    },
    4: {
        "zero1 stages": {**zero(1, **BUCKET), **cut(pipeline=2)},
        "bf16 stages": {**BF16, **zero(1), **cut(pipeline=2)},
        "zero1 stages, shared sequences": {**zero(1, **BUCKET), **cut(pipeline=2, context=2)},
        "zero2, shared sequences": {**BF16, **zero(2, **BUCKET), **cut(context=2)},
    },
    3: {"zero3 bf16, unequal shares of a matrix above the bucket": {**BF16, **zero(3, reduce_bucket_size=20_000)}},
}


@pytest.mark.parametrize("world", BUFFERED)
def test_buffers_are_what_a_reduction_holds(world: int) -> None:
    cases, wrong = BUFFERED[world], {}
    measured = run_ranks(world, measure_engines, list(cases.values()), timeout=300)
    for rank in range(world):
        for (name, arguments), seen in zip(cases.items(), measured[rank], strict=True):
            states = plan(small_config(world, **arguments)).stages[seen["stage"]].states
            for what in ("weights", "gradients", "masters", "moments", "buckets", "gathered"):
                if getattr(states, what) != pytest.approx(seen[what], rel=0.01):
                    wrong[name, rank, what] = (getattr(states, what), seen[what])
    assert not wrong  # planned, measured


def test_zero_divides_what_it_says_it_divides() -> None:
    def total(stage: int, world: int) -> dict[str, int]:
        states = plan(small_config(world, **BF16, **zero(stage))).stages[0].states
        return {name: getattr(states, name) for name in ("weights", "gradients", "masters", "moments")}

    for stage, divided in ((1, {"masters", "moments"}), (2, {"masters", "moments", "gradients"})):
        one, eight = total(stage, 1), total(stage, 8)
        for name in one:
            assert one[name] / eight[name] == pytest.approx(8 if name in divided else 1, rel=0.01), (stage, name)


def test_offload_moves_the_states_to_the_host() -> None:
    here = plan(small_config(2, **BF16, **zero(2))).stages[0].states
    away = plan(small_config(2, **BF16, **zero(2, offload_optimizer={"device": "cpu"}))).stages[0].states
    assert (away.masters, away.moments, away.weights) == (0, 0, here.weights)
    assert away.host >= here.masters + here.moments


def test_flat_gradients_are_copied_only_where_buckets_mix_them() -> None:
    assert _copied_to_reduce([10, 1]) == 11
    assert _copied_to_reduce([600_000_000, 1000]) == 0  # the first fills a bucket alone, the second is alone in the next
    assert _copied_to_reduce([10]) == 0
