"""The policies of recompute side by side: what the page says of one is what a run under it is planned to be, and keeps."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megastab.plan.budget import largest_budget
from megastab.plan.cluster import cluster_named
from megastab.plan.command import load_for, report
from megastab.plan.parameters import stages
from megastab.plan.plan import plan
from megastab.plan.predict import predict
from megastab.plan.recompute import RECOMPUTES, policies, with_recompute
from megastab.plan.text import render
from tests.unit.plan.jobs import small_config
from tests.unit.plan.test_plan_activations import LLAMA, kept_for_backward

LLAMA_7B = str(Path(__file__).parents[3] / "configs" / "llama_7b.json")


def test_each_policy_keeps_what_a_forward_under_it_keeps() -> None:
    config = small_config(model=LLAMA)
    found = policies(config, stages(config.megastab.model, config.layout))
    assert [one.recompute for one in found] == list(RECOMPUTES) == ["none", "selective", "full"]
    kept = [kept_for_backward(with_recompute(config, one.recompute)) for one in found]
    for one, measured in zip(found, kept, strict=True):
        assert one.kept == pytest.approx(measured, rel=0.15)  # the estimate's own
    assert kept == sorted(kept, reverse=True)


def test_the_stage_that_holds_most_is_the_one_told() -> None:
    config = small_config(2, parallel={"pipeline": 2})
    found = policies(config, stages(config.megastab.model, config.layout))
    for one in found:
        made = plan(with_recompute(config, one.recompute))
        assert one.activations == max(stage.activations.peak for stage in made.stages)
        assert made.policies == found


def test_products_by_hand() -> None:
    """FLOPs of a token: four blocks of width 64, q and o whole, k and v half, their attention over 32 positions, a head of 512 rows."""
    config = small_config()
    blocks = 2 * 4 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * config.megastab.model.ffn_hidden_size)
    attention, head = 2 * 32 * 64 * 4, 2 * 512 * 64
    forward = blocks + attention + head
    found = [one.products for one in policies(config, stages(config.megastab.model, config.layout))]
    assert found == pytest.approx([1.0, 1 + attention / (3 * forward), 1 + (blocks + attention) / (3 * forward)])


def test_the_pages_show_them() -> None:
    page = render(plan(small_config(parallel={"recompute": "selective"})))
    assert "Policies of megastab.parallel.recompute" in page and "selective (this)" in page and "x 1.000" in page
    options = Namespace(world_size=None, cluster="h100", nodes=2, search=False)
    found = json.loads(report(LLAMA_7B, [], options, as_json=True))["recompute_policies"]
    cluster = cluster_named("h100", 2)
    for name in RECOMPUTES:
        config = load_for(LLAMA_7B, [f"megastab.parallel.recompute={name}"], cluster, "h100")
        cut = stages(config.megastab.model, config.layout)
        assert found[name]["memory"] == largest_budget(config, cut, cluster).total
        assert found[name]["seconds"] == pytest.approx(predict(config, cluster, cut).seconds)
    assert found["none"]["memory"] > found["full"]["memory"] and found["none"]["seconds"] < found["full"]["seconds"]
    small = ["megastab.parallel.recompute=none", "train_micro_batch_size_per_gpu=16", "gradient_accumulation_steps=null"]
    assert "DOES NOT FIT" in report(LLAMA_7B, small, options)
