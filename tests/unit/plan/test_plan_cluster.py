"""Clusters, and times that can be reckoned by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megastab.config.errors import UserError
from megastab.plan.budget import RESERVE, budget
from megastab.plan.cluster import PRESETS, Cluster, cluster_named, this_cpu
from megastab.plan.parameters import stages
from megastab.plan.plan import plan
from megastab.plan.predict import LATENCY, is_inside_node, predict, seconds_of
from megastab.plan.traffic import traffic
from megastab.plan.transfer import Transfer
from megastab.plan.work import stage_flops
from tests.unit.plan.jobs import small_config

ONE: dict[str, Any] = {
    "nodes": 2, "gpus_per_node": 4, "memory_gb": 16, "peak_tflops": {"bf16": 10, "fp32": 1}, "intra_gbps": 80, "inter_gbps": 8,
}  # fmt: skip
SMALL = Cluster(**ONE)
BF16 = {"bf16": {"enabled": True}}


def written(tmp_path: Path, changes: dict[str, Any]) -> str:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({key: value for key, value in {**ONE, **changes}.items() if value is not None}))
    return str(path)


def test_a_file_says_what_a_preset_says(tmp_path: Path) -> None:
    assert cluster_named(written(tmp_path, {})) == SMALL
    assert cluster_named(written(tmp_path, {"efficiency": 0.4}), nodes=3) == replace(SMALL, efficiency=0.4, nodes=3)
    links = {"host_gb_per_s": 12.5, "disk_gb_per_s": 1}
    assert cluster_named(written(tmp_path, links)) == replace(SMALL, host_gb_per_s=12.5, disk_gb_per_s=1)
    assert cluster_named("h100", 16).world == 128
    assert all(set(preset.peak_tflops) == {"fp32", "bf16", "fp16"} for preset in [*PRESETS.values(), this_cpu()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": 80}, "memory is no key of a cluster. Did you mean memory_gb?"),
        ({"intra_gbps": None}, "intra_gbps is missing"),
        ({"nodes": 0}, "nodes = 0 must be a number above 0"),
        ({"nodes": 1.5}, "nodes = 1.5 must be a whole number"),
        ({"gpus_per_node": True}, "gpus_per_node = True must be a number above 0"),
        ({"inter_gbps": "400"}, "inter_gbps = '400' must be a number above 0"),
        ({"efficiency": 50}, "efficiency = 50 is a share of the peak"),
        ({"disk_gb_per_s": 0}, "disk_gb_per_s = 0 must be a number above 0"),
        ({"host_gbps": 50}, "host_gbps is no key of a cluster. Did you mean"),
        ({"peak_tflops": 989}, "peak_tflops = 989 must be an object"),
        ({"peak_tflops": {"bf16": 1, "fp8": 2}}, "peak_tflops = {'fp8': 2}: keys are fp32, bf16, fp16"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        cluster_named(written(tmp_path, changes))
    assert said in str(error.value)


def test_an_unknown_preset_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="h1000: neither a file nor one of h100, h200, a100-80, this-cpu. Did you mean h100"):
        cluster_named("h1000")
    with pytest.raises(UserError, match="--nodes 0 must be 1 or more"):
        cluster_named("h100", 0)
    (tmp_path / "broken").write_text("{")
    with pytest.raises(UserError, match="broken is not valid JSON, line"):
        cluster_named(str(tmp_path / "broken"))


def test_links_by_the_place_of_a_group() -> None:
    """Ranks fill nodes: tensor fastest, then data, then pipeline."""
    config = small_config(8, parallel={"tensor": 2, "pipeline": 2})
    inside = {group: is_inside_node(config, SMALL, group) for group in ("tensor", "data", "pipeline", "model")}
    assert inside == {"tensor": True, "data": True, "pipeline": False, "model": False}
    assert not is_inside_node(small_config(8, parallel={"tensor": 2}), SMALL, "data")
    shared = small_config(8, parallel={"tensor": 2, "context": 2})
    assert is_inside_node(shared, SMALL, "context") and not is_inside_node(shared, SMALL, "data")
    assert not is_inside_node(small_config(8, model={"num_heads": 8}, parallel={"tensor": 1, "context": 8}), SMALL, "context")


def test_bytes_over_links() -> None:
    config = small_config(8, parallel={"tensor": 4})  # data: two ranks in two nodes, 1e9 bytes a second
    assert seconds_of(Transfer("", "send", "data", 10**9, 0), config, SMALL) == pytest.approx(1.0)
    assert seconds_of(Transfer("", "all_gather", "tensor", 10**10, 0), config, SMALL) == pytest.approx(0.75)
    assert seconds_of(Transfer("", "reduce_scatter", "tensor", 10**10, 0), config, SMALL) == pytest.approx(0.75)
    assert seconds_of(Transfer("", "all_reduce", "tensor", 10**10, 0), config, SMALL) == pytest.approx(1.5)
    shared = small_config(8, parallel={"context": 4})
    assert seconds_of(Transfer("", "all_to_all", "context", 10**10, 0), shared, SMALL) == pytest.approx(0.75)
    assert seconds_of(Transfer("", "all_reduce", "tensor", 0, 3), config, SMALL) == pytest.approx(6 * LATENCY)


def test_a_lone_rank_runs_at_the_efficiency() -> None:
    predicted = predict(small_config(), replace(SMALL, nodes=1, gpus_per_node=1), stages_of(small_config()))
    assert predicted.mfu == pytest.approx(0.5)
    assert (predicted.tensor, predicted.pipeline, predicted.data, predicted.bubble) == (0, 0, 0, 0)


def stages_of(config: Any) -> Any:
    return stages(config.megastab.model, config.layout)


def test_flops_of_the_stages_are_the_models() -> None:
    config = small_config(4, parallel={"tensor": 2, "pipeline": 2})
    forward = sum(stage_flops(config, stage)[0] for stage in stages_of(config))
    made = plan(config)
    assert forward * 3 * 2 * config.accumulation == pytest.approx(made.flops_per_step)  # two tensor-parallel ranks


def test_ranks_that_share_a_sequence_share_its_products_and_pay_for_the_exchange() -> None:
    alone, shared = small_config(2), small_config(4, parallel={"context": 2})
    costs = [stage_flops(config, stages_of(config)[0])[0] for config in (alone, shared)]
    assert costs[0] == pytest.approx(2 * costs[1])
    (cut,) = stages_of(shared)
    predicted = predict(shared, SMALL, [cut])
    exchanges = [t for t in traffic(shared, cut) if t.group == "context"]
    assert {t.kind for t in exchanges} == {"all_to_all"}
    assert predicted.context == pytest.approx(sum(seconds_of(t, shared, SMALL) for t in exchanges))
    others = predicted.compute + predicted.tensor + predicted.pipeline + predicted.data + predicted.bubble
    assert predicted.seconds == pytest.approx(others + predicted.context)
    # 2 x 16 tokens of 64 + 2 x 32 channels of fp32, there and back, four blocks and four micro-batches.
    assert sum(t.bytes for t in exchanges if t.what == "queries, keys, values") == 2 * 16 * 128 * 4 * 2 * 4 * 4


def test_recompute_costs_a_forward_of_the_blocks() -> None:
    costs = {r: stage_flops(c, stages_of(c)[0]) for r in ("none", "selective", "full") if (c := small_config(parallel={"recompute": r}))}
    head = 2.0 * 512 * 64 * 2 * 32
    attention = 2.0 * 32 * 64 * 4 * 2 * 32
    assert [costs[r][1] for r in costs] == pytest.approx([0.0, attention, costs["none"][0] - head])


def test_the_bubble_is_the_plans_share() -> None:
    config = small_config(2, parallel={"pipeline": 2}, gradient_accumulation_steps=4)
    predicted = predict(config, SMALL, stages_of(config))
    steady = predicted.compute + predicted.pipeline + predicted.tensor
    assert predicted.bubble / (steady + predicted.bubble) == pytest.approx(plan(config).bubble)


def test_zero_3_hides_behind_the_products_and_zero_1_does_not() -> None:
    for stage in (1, 3):
        config = small_config(8, **BF16, zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0})
        (cut,) = stages_of(config)
        predicted = predict(config, SMALL, [cut])
        lasts = {t.what: seconds_of(t, config, SMALL) for t in traffic(config, cut)}
        hidden = lasts["gradients"] + lasts["weights as they are used"] if stage == 3 else 0.0
        assert predicted.data == pytest.approx(sum(lasts.values()) - hidden + max(0.0, hidden - predicted.compute))
        if stage == 3:
            assert 0 < predicted.compute < hidden  # this slow link outlasts these small products
            slow = predict(config, replace(SMALL, peak_tflops={"bf16": 1e-6}), [cut])
            assert slow.data == pytest.approx(sum(lasts.values()) - hidden)


def test_a_budget_is_the_plans_peak() -> None:
    small = {"train_micro_batch_size_per_gpu": 1, "model": {"max_seq_len": 8}, "parallel": {"recompute": "full"}}
    at_step = {**small, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    steps = small_config(2, **at_step)  # type: ignore[arg-type]
    assert "step workspace" in budget(steps, stages_of(steps)[0], SMALL).categories
    for arguments in (at_step, {}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}}, {"parallel": {"recompute": "full"}}):
        config = small_config(2, **arguments)  # type: ignore[arg-type]
        made = budget(config, stages_of(config)[0], SMALL)
        assert made.total == plan(config).stages[0].peak
        assert made.available + made.reserve == 16 * 2**30 and made.reserve == int(RESERVE * 16 * 2**30)
