"""Activation offload as it is planned, against the offloader itself and against times reckoned by hand."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megastab.config.config import Config
from megastab.engine.offload import Offloader
from megastab.engine.offload_disk import DiskStore
from megastab.engine.offload_mover import Mover
from megastab.model.block import Block
from megastab.model.transformer import Transformer
from megastab.plan.activations import movable
from megastab.plan.budget import budget
from megastab.plan.cluster import Cluster
from megastab.plan.command import report
from megastab.plan.offload import Offloaded, offloaded
from megastab.plan.parameters import Stage, stages
from megastab.plan.plan import plan
from megastab.plan.predict import predict
from megastab.plan.text import render
from megastab.plan.work import stage_flops
from tests.unit.plan.jobs import small_config
from tests.unit.plan.test_plan_activations import kept_for_backward

ROOT = Path(__file__).parents[3]
SHAPE = {"hidden_size": 128, "max_seq_len": 64}
NODE = Cluster(1, 4, 16.0, {"fp32": 1.0, "bf16": 1.0}, 80.0, 8.0)


def config_with(
    section: dict[str, Any], world: int = 1, recompute: str = "none", model: dict[str, Any] | None = None, **top: Any
) -> Config:
    moved = {"kind": "ssd", "folder": "/nowhere", "amount": "all", "min_kb": 0, **section}
    if moved["kind"] != "ssd":
        del moved["folder"]
    parallel = {"activation_offload": moved, "recompute": recompute, **top.pop("parallel", {})}
    return small_config(world, (model or {}).pop("arch", "llama"), {**SHAPE, **(model or {})}, parallel=parallel, **top)


def stage_of(config: Config) -> Stage:
    (stage,) = stages(config.megastab.model, config.layout)
    return stage


@pytest.mark.parametrize("min_kb", [0, 40])  # 40: the residual stream goes, the keys of two heads, 32 KiB, do not
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "model",
    [{}, {"arch": "gpt", "dropout": 0.1}, {"num_kv_heads": 1, "output_gate": "element", "qk_norm": "head", "sink": "learned"}],
    ids=["llama", "gpt", "gated"],
)
def test_what_leaves_is_what_the_offloader_sends(model: dict[str, Any], recompute: str, min_kb: int, tmp_path: Path) -> None:
    config = config_with({"min_kb": min_kb}, recompute=recompute, model=dict(model))
    found = plan(config).stages[0].activations
    offloaders: list[Offloader] = []

    def offload(net: Transformer) -> None:
        blocks = [part for part in net.modules() if isinstance(part, Block)]
        offloaders.append(Offloader(blocks, Mover(DiskStore(tmp_path)), takes_all=True, min_bytes=min_kb * 1024))

    def settle() -> None:
        scope = offloaders[0]._scope
        while scope is not None:
            scope.settle()
            scope = scope.previous

    stays = kept_for_backward(config, prepare=offload, settle=settle)
    # Both from the same shapes; a LayerNorm's mean and deviation are counted as one storage, which min_kb sees.
    assert found.away == pytest.approx(offloaders[0].counts.written, rel=0.02) and found.away > 0
    assert found.per_micro_batch - found.away == pytest.approx(stays, rel=0.15)  # as the estimate of all that is kept


def test_the_last_block_stays_and_two_are_on_their_way() -> None:
    config = config_with({})
    away = plan(config).stages[0].activations
    here = plan(small_config(model=SHAPE)).stages[0].activations
    assert here.away == here.moving == 0 < movable(config)
    assert away.away == 3 * movable(config) and away.moving == 2 * movable(config)
    assert here.peak - away.peak == movable(config)
    assert away.outside == away.away
    lone = config_with({}, model={"num_layers": 1})
    assert plan(lone).stages[0].activations.away == 0 == offloaded(lone, stage_of(lone), NODE).movable


def test_every_micro_batch_of_a_pipeline_waits_outside_and_max_gb_is_kept() -> None:
    config = config_with({}, world=2, parallel={"pipeline": 2}, model={"num_layers": 8})
    first = plan(config).stages[0].activations
    assert first.in_flight == 2 and first.outside == 2 * first.away == 2 * 3 * movable(config)
    assert first.peak == 2 * (first.per_micro_batch - first.away) + 2 * movable(config) + first.workspace
    limited = plan(config_with({"max_gb": 1e-3}, world=2, parallel={"pipeline": 2}, model={"num_layers": 8})).stages[0].activations
    assert limited.outside == 1_000_000 < first.outside


def disk(rate: float) -> Cluster:
    return replace(NODE, disk_gb_per_s=rate / 1e9)


def test_the_bandwidth_decides_what_leaves() -> None:
    config = config_with({"amount": "measured"})
    stage = stage_of(config)

    def at(rate: float) -> Offloaded:
        return offloaded(config, stage, disk(rate))

    needed = at(1.0).needed
    assert at(1.001 * needed).share == 1.0 and 0.9 < at(0.95 * needed).share < 1.0
    assert 0.0 < at(needed / 10).share < at(needed / 3).share < at(0.9 * needed).share
    assert at(1.0).activations.away == 0
    # By hand. The third block leaves last: while the fourth and the head run, and in four fifths of that time.
    forward = stage_flops(config, replace(stage, has_head=False))[0]
    head = stage_flops(config, stage)[0] - forward
    window = (forward / 4 + 3 * head) / 0.5e12
    assert needed == pytest.approx(movable(config) / (0.8 * window), rel=0.3)
    assert needed > movable(config) / (0.8 * window)  # it begins only when the second is out
    assert at(needed).waits == at(1.0).waits == 0.0  # what is measured waits for nothing


def test_a_stage_of_a_pipeline_has_longer_to_write_and_not_to_read() -> None:
    """While another micro-batch comes and goes there is time to write; each block still comes back beside the next one's backward."""
    config = config_with({"amount": "measured"}, world=2, parallel={"pipeline": 2}, model={"num_layers": 8})
    first = stages(config.megastab.model, config.layout)[0]
    backward = 2 * stage_flops(config, replace(first, has_head=False))[0] / first.num_blocks / 0.5e12
    assert offloaded(config, first, NODE).needed == pytest.approx(movable(config) / (0.8 * backward), rel=0.01)


def test_what_is_late_counts_as_here() -> None:
    """At a tenth of what all of it would need the link is busy throughout forward, from the first of sixteen blocks' end on."""
    config = config_with({"amount": "measured"}, model={"num_layers": 16})
    needed = offloaded(config, stage_of(config), NODE).needed
    found = [offloaded(config, stage_of(config), disk(needed * share)) for share in (1.001, 0.5, 0.1)]
    here = [one.activations.per_micro_batch - one.activations.away + one.activations.moving for one in found]
    assert here == sorted(here) and here[0] < here[2] <= found[0].activations.per_micro_batch
    one = found[2].activations
    forward = stage_flops(config, replace(stage_of(config), has_head=False))[0] / 0.5e12
    assert one.away - one.moving == pytest.approx(found[2].rate * forward * 15 / 16, rel=0.01)
    assert one.moving > 2 * one.away / 15  # more than two blocks' share


def test_all_waits_for_a_slow_link() -> None:
    config = config_with({"kind": "cpu"})
    stage = stage_of(config)
    slow = replace(NODE, host_gb_per_s=1e-3)
    found = offloaded(config, stage, slow)
    assert found.share == 1.0 and found.rate == 1e6
    products = stage_flops(config, replace(stage, has_head=False))[0] / 0.5e12
    moved = movable(config) / 1e6  # one block of three; two are taken back on their way
    assert found.waits == pytest.approx(2 * moved - 3 * products)
    predicted, fast = predict(config, slow, [stage]), predict(config, NODE, [stage])
    assert predicted.offload == pytest.approx(config.accumulation * found.waits) and fast.offload == 0.0
    assert predicted.seconds - fast.seconds == pytest.approx(predicted.offload)


def test_a_budget_is_that_of_what_stays() -> None:
    config = config_with({"amount": "measured"})
    one = budget(config, stage_of(config), disk(1e15)).categories["activations"]
    none = budget(config, stage_of(config), disk(1.0)).categories["activations"]
    assert none - one == movable(config)  # three blocks go; two are on their way


def options(**given: Any) -> Namespace:
    return Namespace(**{"world_size": None, "cluster": None, "nodes": None, "search": False, **given})


def test_the_pages_say_what_leaves() -> None:
    overrides = ['megastab.parallel.activation_offload={"kind":"ssd","folder":"/local"}', "megastab.parallel.recompute=full"]
    llama = str(ROOT / "configs" / "llama_7b.json")
    page = report(llama, overrides, options(cluster="h100"))
    for said in ("wait in the disk (amount: measured)", "that all of it would need", "ranks of a node have up to", "3 GB/s"):
        assert said in page, said
    assert "wait in the disk" not in report(llama, [], options(cluster="h100"))
    found = json.loads(report(llama, overrides, options(cluster="h100"), as_json=True))["activation_offload"]
    assert 0 < found[0]["activations"]["away"] < found[0]["movable"]
    plain = render(plan(config_with({"amount": "measured"})))
    assert "as if all of it went in time" in plain and "activations outside" in plain
    assert "as if all" not in render(plan(config_with({}))) and "activations outside" not in render(plan(small_config()))
