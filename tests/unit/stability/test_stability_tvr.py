"""TVR against the released formula, at any layout, with one all-reduce."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megastab.parallel.param_info import ParamInfo, Part
from megastab.stability import tvr as tvr_module
from megastab.stability.tvr import TVR
from tests import jobs
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks

W = torch.tensor([[0.03, -0.01, 0.05], [-0.04, 0.02, 0.01]])
# Target, threshold -> the matrix afterwards (None: it does not fire). Computed by hand from mean .01 and unbiased std .0316227766.
GOLDEN: dict[tuple[float, float], list[float] | None] = {
    (0.01, 1.2): [0.0163245553, 0.0036754447, 0.0226491106, -0.0058113883, 0.0131622777, 0.01],
    (0.02, 1.2): [0.0226491106, -0.0026491106, 0.0352982213, -0.0216227766, 0.0163245553, 0.01],
    (0.03, 1.2): None,
    (0.03, 1.0): [0.0289736660, -0.0089736660, 0.0479473319, -0.0374341649, 0.0194868330, 0.01],
    (0.035, 1.0): None,
}


@pytest.mark.parametrize("case", GOLDEN)
def test_matches_the_formula_and_keeps_the_mean(case: tuple[float, float]) -> None:
    matrix, wanted = W.clone(), GOLDEN[case]
    events = TVR(target_std=case[0], ratio_threshold=case[1]).rescale_({"w": matrix})
    assert len(events) == (wanted is not None)
    torch.testing.assert_close(matrix.flatten(), torch.tensor(wanted) if wanted else W.flatten(), rtol=0, atol=1e-8)


def test_statistics_are_exact_at_size() -> None:
    big = torch.randn(3000, 1001, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.001
    wanted, mean = float(big.double().std()), float(big.double().mean())
    (event,) = TVR(0.01).rescale_({"big": big})
    assert event.std == pytest.approx(wanted, rel=1e-7) and event.mean == pytest.approx(mean, rel=1e-5)
    assert float(big.double().std()) == pytest.approx(0.01, rel=1e-6) and float(big.double().mean()) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_what_has_no_deviation_is_left_alone(value: float) -> None:
    assert TVR(0.01).rescale_({"w": torch.full((4, 4), value)}) == []


def test_options_choose_target_and_side() -> None:
    tvr = TVR(0.01, targets={"v": 0.02}, depth_scaled=True, two_sided=True, ratio_threshold=1.5, exclude=("k",))
    assert tvr.target("v", 3) == 0.01 and tvr.target("q", None) == 0.01
    assert tvr.fires(0.016, 0.01) and tvr.fires(0.006, 0.01) and not tvr.fires(0.008, 0.01) and not TVR(0.01).fires(0.006, 0.01)
    parts = [(ParamInfo((part,)), part) for part in (Part.whole(role, role, 4) for role in ("q", "k", "embedding", "norm"))]
    assert [part.name for _, part in tvr.selected(parts)] == ["q"]


def test_looks_every_interval_and_remembers_the_phase() -> None:
    tvr = TVR(interval_steps=3)
    assert [tvr.advance() for _ in range(4)] == [False, False, True, False]
    later = TVR(interval_steps=3)
    later.load_state_dict(tvr.state_dict())
    assert [later.advance() for _ in range(2)] == [False, True]


@pytest.mark.parametrize("setting", [{"target_std": 0.0}, {"ratio_threshold": 0.5}, {"interval_steps": 0}])
def test_bad_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        TVR(**setting)


def fire(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: two steps, TVR looking after the second; what it reduced, and what the masters and copies hold."""
    job = jobs.start(config)
    tables: list[tuple[int, ...]] = []
    reduce = tvr_module.collectives.sum_doubles_

    def counted(table: torch.Tensor, group: Any) -> None:
        tables.append(tuple(table.shape))
        reduce(table, group)

    tvr_module.collectives.sum_doubles_ = counted
    job.step(), job.step()
    stale = sum(
        int((fragment.low.float() != fragment.master.to(fragment.low.dtype).float()).sum()) for fragment in job.built.adapter.fragments()
    )
    return {"tables": tables, "stale": stale, "names": sorted(event.name for event in job.built.controller.rescaled)}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(Layout(2), "fp32"), (Layout(2, zero=1), "bf16"), (Layout(3, zero=2), "bf16"), (Layout(2, zero=3), "bf16"), (Layout(2, tp=2), "fp32")],
    ids=["plain", "bf16", "zero2", "zero3", "tp2"],
)
def test_one_all_reduce_for_all_matrices_and_no_stale_copy(layout: Layout, dtype: str) -> None:
    config = config_of(layout, "AdamW", dtype, stability={"tvr": {"target_std": 0.05, "interval_steps": 2}})
    ranks = run_ranks(layout.world, fire, config)
    for found in ranks:
        assert found["tables"] == [(14, 2)]  # 7 matrices of 2 layers, one table, one firing
        assert found["stale"] == 0 and len(found["names"]) == 14 and found["names"] == ranks[0]["names"]
