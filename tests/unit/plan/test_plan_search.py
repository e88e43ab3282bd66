"""The search over layouts, and what both commands print."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megastab import pretrain
from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.load import load_config
from megastab.plan.budget import largest_budget
from megastab.plan.cluster import Cluster
from megastab.plan.cluster_text import found_page
from megastab.plan.command import report, spread
from megastab.plan.parameters import stages
from megastab.plan.predict import predict
from megastab.plan.search import search
from tests.layouts import SINGLE, config_of
from tests.unit.plan.jobs import small_config

ROOT = Path(__file__).parents[3]
LLAMA_7B = str(ROOT / "configs" / "llama_7b.json")
NODE = Cluster(1, 4, 16.0, {"bf16": 10.0, "fp32": 1.0}, 80.0, 8.0)
BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def options(**given: Any) -> Namespace:
    return Namespace(**{"world_size": None, "cluster": None, "nodes": None, "search": False, **given})


def to_search(**top: Any) -> Config:
    return spread(small_config(train_batch_size=8, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=8, **top), NODE)


def test_every_cut_of_four_ranks_is_judged_once() -> None:
    found = search(to_search(**BF16), NODE)
    cuts = [(c.layout.tensor, c.layout.pipeline, c.zero_stage, c.micro_batch, c.megastab.parallel.recompute) for c in configs(found)]
    assert len(cuts) == len(set(cuts))
    # tp x pp of 4 ranks; micro-batches 1 .. 8 / dp; three recomputes; ZeRO 1 to 3, with stages only 1.
    micro = {1: 4, 2: 3, 4: 2}  # by dp
    expected = sum(3 * micro[4 // (t * p)] * (3 if p == 1 else 1) for t in (1, 2, 4) for p in (1, 2, 4) if t * p <= 4)
    assert len(cuts) == expected
    assert found.reasons == {"ZeRO 2 and 3 exclude pipeline stages": 2 * 3}
    assert all(c.layout.world == 4 and c.global_batch == 8 == c.micro_batch * c.accumulation * c.layout.data for c in configs(found))


def test_a_billion_nodes_take_no_longer_than_one() -> None:
    huge = replace(NODE, nodes=10**9)
    found = search(spread(to_search(**BF16), huge), huge)  # no walk over the divisors of the number of ranks
    assert not found.fitting
    assert found.reasons["more pipeline stages than blocks"] == 3  # once for tensor 1, 2 and 4


def configs(found: Any) -> list[Config]:
    return [candidate.config for candidate in found.fitting]


def test_the_first_is_the_fastest_that_fits() -> None:
    found = search(to_search(**BF16), NODE)
    seconds = [candidate.prediction.seconds for candidate in found.fitting]
    assert seconds == sorted(seconds)
    for candidate in (found.fitting[0], found.fitting[-1]):
        # What the search says of a cut is what the config with its overrides is planned to be.
        source = {**raw(), "train_batch_size": 8}
        config = load_config(source, [*candidate.overrides.split(), "zero_optimization.reduce_bucket_size=5000000"], world_size=4)
        cut = stages(config.megastab.model, config.layout)
        assert largest_budget(config, cut, NODE) == candidate.budget
        assert predict(config, NODE, cut).seconds == pytest.approx(candidate.prediction.seconds)


def test_ranks_share_long_sequences_only() -> None:
    model = {"num_heads": 4, "num_kv_heads": 2, "max_seq_len": 1 << 14}
    found = search(to_search(**BF16, model=model), replace(NODE, memory_gb=500.0))
    cuts = {(c.layout.tensor, c.layout.context) for c in configs(found)}
    assert cuts == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}  # whole heads of two KV heads, or a copy of one
    assert all(c.layout.tensor * c.layout.context * c.layout.pipeline * c.layout.data == 4 for c in configs(found))
    assert {c.layout.context for c in configs(search(to_search(**BF16, model={**model, "max_seq_len": 1 << 13}), NODE))} == {1}
    shared = next(candidate for candidate in found.fitting if candidate.config.layout.context == 2)
    source = {**raw(model=model), "train_batch_size": 8}
    config = load_config(source, [*shared.overrides.split(), "zero_optimization.reduce_bucket_size=5000000"], world_size=4)
    assert config.layout == shared.config.layout
    assert predict(config, NODE, stages(config.megastab.model, config.layout)).seconds == pytest.approx(shared.prediction.seconds)
    assert "  cp  " in found_page(found, NODE)


def test_ranks_share_short_sequences_where_nothing_else_is_possible() -> None:
    """One sample, and nothing to cut by tensors or stages: four ranks can only share it."""
    odd = {"num_layers": 1, "ffn_hidden_size": 129}
    config = small_config(model=odd, train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, **BF16)
    found = search(spread(config, NODE), NODE)
    assert {c.layout.context for c in configs(found)} == {4}


def raw(**top: Any) -> dict[str, Any]:
    config = small_config(**BF16, **top)
    free = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": None, "zero_optimization": {"stage": 1}}
    return {**config.deepspeed, "megastab": config.megastab.model_dump(mode="json"), **free}


def test_what_does_not_fit_is_counted_by_its_largest_category() -> None:
    found = search(to_search(**BF16), replace(NODE, memory_gb=0.0004))
    assert not found.fitting and found.closest is not None
    config, closest = found.closest
    assert not closest.fits and closest.largest in closest.categories
    told = sum(count for reason, count in found.reasons.items() if reason.startswith("does not fit, "))
    assert told == len(search(to_search(**BF16), NODE).fitting)


def test_a_model_that_fits_nowhere_says_what_is_too_large_and_what_would_help(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        report(LLAMA_7B, [], options(cluster=cluster_file(tmp_path, memory_gb=12), search=True))
    said = str(error.value)
    assert "it fits nowhere: the closest is tensor" in said and "most of it" in said and "The nearest change: --nodes 2" in said
    with pytest.raises(UserError, match="More nodes do not help: a GPU of"):
        report(LLAMA_7B, [], options(cluster=cluster_file(tmp_path, memory_gb=0.25), search=True))


def cluster_file(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "cluster.json"
    whole = {"nodes": 1, "gpus_per_node": 8, "memory_gb": 80, "peak_tflops": {"bf16": 989}, "intra_gbps": 3600, "inter_gbps": 400}
    path.write_text(json.dumps({**whole, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("given", "overrides", "said"),
    [
        ({"search": True}, [], "--search and --nodes plan for a cluster"),
        ({"cluster": "h100", "world_size": 4}, [], "--world-size 4 is not the cluster's 1 x 8 GPUs"),
        ({"cluster": "h100", "search": True}, ["train_batch_size=null"], "--search compares layouts of one global batch"),
        ({"cluster": "file"}, ["bf16.enabled=false"], "peak_tflops has no fp32"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, given: dict[str, Any], overrides: list[str], said: str) -> None:
    if given.get("cluster") == "file":
        given = {**given, "cluster": cluster_file(tmp_path)}
    with pytest.raises(UserError) as error:
        report(LLAMA_7B, overrides, options(**given))
    assert said in str(error.value)


def test_both_commands_print_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    page = report(LLAMA_7B, [], options(cluster="h100", nodes=4))
    assert pretrain.main(["--deepspeed_config", LLAMA_7B, "--dry-run", "--cluster", "h100", "--nodes", "4"]) == 0
    assert capsys.readouterr().out == page + "\n"
    for said in (
        "32 ranks = tensor 4 x pipeline 2 x data 4",
        "logits and loss",
        "activations to the next stage",
        "MFU",
        "not a measurement",
    ):
        assert said in page
    assert pretrain.main(["--deepspeed_config", LLAMA_7B, "--cluster", "h100"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


def test_the_buckets_are_those_of_the_machine_planned_for() -> None:
    given = ["megastab.parallel.pipeline=1", "zero_optimization.stage=2"]
    made = json.loads(report(LLAMA_7B, given, options(cluster="h100"), as_json=True))
    assert made["stages"][0]["states"]["buckets"] == (2 + 2 + 4) * 50_000_000  # here, on a CPU, a tenth


def test_a_search_names_ten_and_why_not_the_others() -> None:
    page = report(LLAMA_7B, [], options(cluster="h100", search=True))
    assert "  10." in page and "  11." not in page
    assert "does not fit, activations most of all" in page and "not a measurement" in page
    listed = json.loads(report(LLAMA_7B, [], options(cluster="h100", search=True), as_json=True))
    assert listed["layouts"][0]["overrides"] in page


def test_a_search_of_fp32_reaches_zero_0() -> None:
    found = search(spread(load_config(config_of(SINGLE), world_size=1), NODE), NODE)
    assert {candidate.config.zero_stage for candidate in found.fitting} == {0, 1, 2, 3}
