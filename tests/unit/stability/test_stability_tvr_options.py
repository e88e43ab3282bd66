"""TVR's interval in tokens, its warning at the start, and the deviations it keeps: the same at every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megastab.config.errors import UserError
from megastab.config.library import load_block
from megastab.config.load import load_config
from megastab.config.schema_stability import TVRConfig
from megastab.parallel.param_info import ParamInfo, Part
from megastab.stability import tvr as tvr_module
from megastab.stability.tvr import BLOCK, TVR
from megastab.wrappers.adapter import Fragment
from tests import jobs
from tests.layouts import GLOBAL_BATCH, SEQ, SINGLE, STEPS, Layout, config_of
from tests.ranks import run_ranks

TOKENS = GLOBAL_BATCH * SEQ  # of a step
NUM_MATRICES = 14  # 7 of each of 2 layers


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (TOKENS, 1), (TOKENS + 1, 2), (5 * TOKENS, 5), (5 * TOKENS - 1, 5)])
def test_an_interval_in_tokens_is_rounded_up_to_steps(tokens: int, steps: int) -> None:
    tvr = TVR(interval_tokens=tokens, tokens_per_step=TOKENS)
    assert tvr.interval == steps
    assert [tvr.advance() for _ in range(2 * steps)] == ([False] * (steps - 1) + [True]) * 2


def test_steps_are_the_default_and_need_no_tokens() -> None:
    assert TVR().interval == 50 and TVR(interval_steps=7, tokens_per_step=TOKENS).interval == 7


def test_an_interval_without_the_tokens_of_a_step_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="interval_tokens = 1000 needs tokens_per_step.*give interval_steps instead"):
        TVR(interval_tokens=1000)


def test_two_intervals_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="interval_steps = 20 and interval_tokens = 1000 are both given: keep one"):
        TVR(interval_steps=20, interval_tokens=1000, tokens_per_step=TOKENS)


@pytest.mark.parametrize("setting", ["interval_tokens", "tokens_per_step"])
def test_no_tokens_is_no_interval(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} = 0 must be positive"):
        TVR(**{"interval_tokens": 5, "tokens_per_step": 5, setting: 0})


BOTH = {"interval_steps": 20, "interval_tokens": 1000}
SAID = "interval_steps = 20 and interval_tokens = 1000 are both given: leave interval_steps at 50, or set interval_tokens to null"


def test_two_intervals_in_the_json_are_refused_in_both_ways_in() -> None:
    with pytest.raises(UserError, match=SAID) as trainer:
        load_config(config_of(SINGLE, stability={"tvr": BOTH}), world_size=1)
    assert "megastab.stability.tvr" in str(trainer.value)
    with pytest.raises(UserError, match=SAID):
        load_block({"megastab": {"stability": {"tvr": BOTH}}}, {}, must_have=True)


@pytest.mark.parametrize("given", [{"interval_tokens": 1000}, {"interval_tokens": 1000, "interval_steps": 50}, {"interval_steps": 20}])
def test_one_interval_in_the_json_loads_also_resolved(given: dict[str, int]) -> None:
    once = load_config(config_of(SINGLE, stability={"tvr": given}), world_size=1)
    again = load_config(once.resolved(), world_size=1)  # everything explicit, interval_steps = 50 too
    section = again.megastab.stability.tvr
    assert section is not None and section == once.megastab.stability.tvr and section.model_dump(include=set(given)) == given
    assert TVR(**section.model_dump(), tokens_per_step=again.tokens_per_step).interval == (6 if "interval_tokens" in given else 20)


def test_default_of_the_json_is_steps() -> None:
    assert TVRConfig().interval_tokens is None and TVRConfig().interval_steps == TVR().interval == 50


# -- the warning at the start, on plain tensors ------------------------------------------------------------------------------


def held(stds: dict[str, float]) -> tuple[list[Fragment], list[tuple[ParamInfo, Part]]]:
    """A matrix of each role with exactly this std and mean 0, layer by layer."""
    fragments = []
    for layer, (role, std) in enumerate(stds.items()):
        part = Part.whole(f"layers.{layer}.{role}", role, 8)  # type: ignore[arg-type]
        flat = torch.tensor([1.0, -1.0]).repeat(16) * std * math.sqrt(31 / 32)
        info = ParamInfo((part,), layer, 4)
        fragments.append(Fragment(torch.nn.Parameter(flat), info, part, 0, flat, flat))
    return fragments, [(fragment.info, fragment.part) for fragment in fragments]


def warning(tvr: TVR, stds: dict[str, float]) -> str | None:
    return tvr.start_warning(*held(stds), None, True)


def test_a_target_far_below_every_matrix_is_told_with_the_list() -> None:
    said = warning(TVR(0.01, targets={"up": 0.02}, interval_steps=7), {"q": 0.021, "up": 0.05})
    assert said is not None and "every matrix by more than 2x" in said and "after 7 steps" in said
    assert "layers.0.q: 0.021 / 0.01, layers.1.up: 0.05 / 0.02." in said


@pytest.mark.parametrize(
    ("settings", "stds"),
    [
        ({}, {"q": 0.021, "up": 0.019}),  # one of them is near: what LIR with a target gives
        ({}, {"q": 0.021, "up": 0.002}),
        ({}, {"q": 0.021, "up": float("nan")}),
        ({}, {"q": 0.019, "up": 0.019}),  # fires on all, but by less than 2x
        ({}, {"q": 0.001, "up": 0.001}),  # far, but one-sided
        ({"ratio_threshold": 4.0}, {"q": 0.03, "up": 0.03}),  # far, but it would not fire
        ({}, {}),
    ],
)
def test_nothing_is_told_otherwise(settings: dict[str, Any], stds: dict[str, float]) -> None:
    assert warning(TVR(0.01, **settings), stds) is None


def test_two_sided_far_below_is_told_too() -> None:
    assert warning(TVR(0.01, two_sided=True), {"q": 0.004, "up": 0.03}) is not None


def test_depth_lowers_the_targets_that_are_compared() -> None:
    stds = {"q": 0.021, "k": 0.015}  # layer 1 has the target .01 / sqrt(2)
    assert warning(TVR(0.01), stds) is None
    assert warning(TVR(0.01, depth_scaled=True), stds) is not None


def test_asking_changes_nothing_but_what_was_seen() -> None:
    tvr, (fragments, matrices) = TVR(0.01), held({"q": 0.05})
    before = fragments[0].master.clone()
    assert tvr.start_warning(fragments, matrices, None, True)
    assert torch.equal(fragments[0].master, before) and tvr.applied_steps == 0
    assert tvr.stds == pytest.approx({"layers.0.q": 0.05}, rel=1e-6)


# -- the deviations ----------------------------------------------------------------------------------------------------------


def test_deviations_are_those_before_the_rescale_and_of_the_last_look_only() -> None:
    tvr = TVR(0.01)
    assert tvr.stds == {}
    fragments, matrices = held({"q": 0.05, "v": 0.002, "up": float("nan")})
    names = ["layers.0.q", "layers.1.v", "layers.2.up"]
    tvr.rescale_fragments_(fragments, matrices, None, True)
    assert list(tvr.stds) == names and tvr.stds[names[0]] == pytest.approx(0.05) and tvr.stds[names[1]] == pytest.approx(0.002)
    assert math.isnan(tvr.stds[names[2]])
    tvr.rescale_fragments_(fragments[:1], matrices[:1], None, True)
    assert tvr.stds == pytest.approx({names[0]: 0.01})


def test_deviations_of_plain_tensors() -> None:
    tvr = TVR(0.01)
    tvr.rescale_({"a": torch.tensor([[0.03, -0.01, 0.05], [-0.04, 0.02, 0.01]]), "b": torch.tensor([[0.001, -0.001]])})
    assert tvr.stds == pytest.approx({"a": 0.0316227766, "b": 0.001 * math.sqrt(2)}, rel=1e-6)


# Runs: whole blocks join, a ragged end closes a run, a hole and another storage do too.
@pytest.mark.parametrize(
    ("lengths", "runs"),
    [((2 * BLOCK, BLOCK, 3 * BLOCK), 1), ((BLOCK, BLOCK + 5, BLOCK, 7), 2), ((5, 9, 13), 3), ((4 * BLOCK,), 1)],
)
def test_neighbours_in_memory_are_summed_at_once_to_the_same_bits(lengths: tuple[int, ...], runs: int) -> None:
    flat = torch.randn(3 + sum(lengths), generator=torch.Generator().manual_seed(0))
    pieces = list(flat[3:].split(lengths))
    joined = list(tvr_module._runs(pieces))
    assert len(joined) == runs and torch.equal(torch.cat(joined), flat[3:])
    assert torch.equal(tvr_module.sums_of_pieces(pieces), torch.cat([tvr_module.sums_of_pieces([piece.clone()]) for piece in pieces]))
    backwards = list(reversed(pieces))  # neighbours, in the wrong order
    assert torch.equal(torch.cat(list(tvr_module._runs(backwards))), torch.cat(backwards))


def test_a_run_ends_with_its_storage_and_before_a_hole() -> None:
    memory = bytearray(torch.randn(4 * BLOCK, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
    left, right = (torch.frombuffer(memory, dtype=torch.float32, count=2 * BLOCK, offset=offset) for offset in (0, 8 * BLOCK))
    assert left.data_ptr() + 8 * BLOCK == right.data_ptr(), "neighbours in memory, of two storages"
    assert [run.numel() for run in tvr_module._runs([left, right])] == [2 * BLOCK, 2 * BLOCK]
    hole = torch.zeros(3 * BLOCK)
    assert [run.numel() for run in tvr_module._runs([hole[:BLOCK], hole[2 * BLOCK :]])] == [BLOCK, BLOCK]


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
@pytest.mark.parametrize("mean", [0.0, 0.02])
def test_sums_are_those_of_doubles_at_every_length(size: int, mean: float) -> None:
    pieces = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * 0.02 + mean for n in (size, 3)]
    found = tvr_module.sums_of_pieces(pieces)
    wanted = torch.stack([torch.stack([p.double().sum(), p.double().square().sum()]) for p in pieces])
    # A sum around 0 cancels: it is as exact as the sum of what was added.
    assert ((found - wanted).abs()[:, 0] < 1e-6 * torch.stack([p.double().abs().sum() for p in pieces])).all()
    torch.testing.assert_close(found[:, 1], wanted[:, 1], rtol=1e-6, atol=0)


# -- on ranks ----------------------------------------------------------------------------------------------------------------


def arm(job: Any, **settings: Any) -> TVR:
    """Exchange the controller's TVR for one of these settings and the job's own tokens of a step."""
    tvr = TVR(**settings, tokens_per_step=job.config.tokens_per_step)
    job.built.controller.tvr = tvr
    return tvr


def start_warning(job: Any, tvr: TVR) -> str | None:
    controller, adapter, grid = job.built.controller, job.built.adapter, job.grid
    counts = adapter.is_partitioned or grid.dp.rank == 0
    return tvr.start_warning(list(adapter.fragments()), controller._matrices, grid.stage.group, counts, grid.pp.group)


def firing_steps(config: dict[str, Any], tokens: int) -> list[int]:
    """On a rank: the steps after which something was rescaled."""
    job = jobs.start(config)
    arm(job, target_std=0.05, two_sided=True, interval_tokens=tokens)  # on either side: every look rescales everything
    fired = []
    for step in range(1, STEPS + 1):
        job.step()
        fired += [step] if job.built.controller.rescaled else []
    return fired


@pytest.mark.parametrize("layout", [SINGLE, Layout(2), Layout(2, zero=1, accumulation=2)], ids=str)
def test_an_interval_in_tokens_counts_those_of_all_ranks(layout: Layout) -> None:
    config = config_of(layout, stability={"tvr": {"interval_steps": 1000}})
    assert run_ranks(layout.world, firing_steps, config, 5 * TOKENS // 2) == [[3, 6]] * layout.world


def deviations(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the warning and the deviations at the start, those two steps later, and how many tables were reduced for each."""
    job = jobs.start(config)
    tvr = arm(job, target_std=0.04, interval_tokens=2 * TOKENS)
    tables: list[tuple[int, ...]] = []
    reduce = tvr_module.collectives.sum_doubles_

    def counted(table: torch.Tensor, group: Any) -> None:
        tables.append(tuple(table.shape))
        reduce(table, group)

    tvr_module.collectives.sum_doubles_ = counted
    said, at_start = start_warning(job, tvr), tvr.stds
    job.step(), job.step()
    return {"said": said, "at_start": at_start, "later": tvr.stds, "tables": tables}


LAYOUTS = {"tp2": Layout(2, tp=2), "dp2": Layout(2), "zero3": Layout(2, zero=3), "pp2": Layout(2, pp=2, accumulation=2)}


def joined(ranks: list[dict[str, Any]], key: str) -> dict[str, float]:
    """The dictionaries of the stages as one."""
    return {name: std for rank in ranks for name, std in rank[key].items()}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_ranks(1, deviations, deviating(SINGLE))[0]


def deviating(layout: Layout) -> dict[str, Any]:
    """Initial std .1, SGD: updates that do not amplify rounding."""
    return config_of(layout, "SGD", stability={"tvr": {"interval_steps": 1000}})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_sees_the_same_deviations_and_says_the_same(name: str, single: dict[str, Any]) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(layout.world, deviations, deviating(layout))
    per_stage = NUM_MATRICES // layout.pp
    for found in ranks:
        assert found["tables"] == [(per_stage, 2)] * 2, "one all-reduce at the start, one at the look"
        assert len(found["at_start"]) == len(found["later"]) == per_stage
        assert found["said"] == single["said"] and found["said"].count(" / 0.04") == NUM_MATRICES
    if layout.pp == 1:
        assert all(found["later"] == ranks[0]["later"] for found in ranks), "reduced values: equal to the last bit"
    # The same weights: only the order of sums of 1024 to 2048 squares differs (fp32 within a block of 4096).
    assert joined(ranks, "at_start") == pytest.approx(single["at_start"], rel=3e-7)
    # Two SGD steps later the weights themselves differ by rounding.
    assert joined(ranks, "later") == pytest.approx(single["later"], rel=2e-6)
    assert single["later"] != pytest.approx(single["at_start"], rel=1e-4), "the weights must have moved"


def test_masters_that_ask_for_gradients_are_looked_at_outside_a_step(single: dict[str, Any]) -> None:
    config = config_of(Layout(2, zero=1), "SGD", "bf16", stability={"tvr": {"interval_steps": 1000}})
    for found in run_ranks(2, deviations, config):
        assert found["said"] is not None and found["tables"] == [(NUM_MATRICES, 2)] * 2
        # Weights rounded to 8 bits: up to 2^-9 each, and far less in the mean of 1024 squares.
        assert found["at_start"] == pytest.approx(single["at_start"], rel=1e-3)


def said_under_lir(config: dict[str, Any]) -> list[str | None]:
    job = jobs.start(config)
    return [start_warning(job, TVR(target)) for target in (0.045, 0.03)]


def test_one_stage_alone_is_not_every_matrix() -> None:
    """LIR: std .1 in the first block, .0707 in the second, which is the other stage."""
    layout = LAYOUTS["pp2"]
    config = config_of(layout, model__init={"scheme": "lir"}, stability={"tvr": {"interval_steps": 1000}})
    for near, far in run_ranks(layout.world, said_under_lir, config):
        assert near is None
        assert far is not None and far.count(" / 0.03") == NUM_MATRICES and "layers.1." in far and "layers.0." in far
