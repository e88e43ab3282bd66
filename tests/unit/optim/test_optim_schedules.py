"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from megastab.optim.schedules import build_schedule, lr_factor

KINDS = ["cosine", "linear", "wsd", "constant"]


def factors(kind: str, total: int = 100, warmup: int = 10, low: float = 0.1, decay: float = 0.2) -> list[float]:
    return [lr_factor(step, kind, total, warmup, low, decay) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_linear_and_never_zero(kind: str) -> None:
    assert factors(kind)[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert factors(kind, warmup=0)[0] > 0.9, "no warm-up starts near the peak"


@pytest.mark.parametrize("kind", KINDS)
def test_curve_stays_between_its_ends_and_falls(kind: str) -> None:
    curve = factors(kind)[9:]
    assert curve == sorted(curve, reverse=True) and curve[0] == 1.0
    assert curve[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert lr_factor(500, kind, 100, 10, 0.1, 0.2) == pytest.approx(curve[-1]), "beyond the end it stays"


def test_cosine_and_linear_are_their_formulas() -> None:
    for step in range(10, 100):
        progress = (step - 9) / 90
        assert factors("cosine")[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert factors("linear")[step] == pytest.approx(0.1 + 0.9 * (1 - progress))


def test_wsd_is_stable_then_linear() -> None:
    curve = factors("wsd", decay=0.25)
    assert curve[10:75] == [1.0] * 65
    assert curve[75:] == pytest.approx([0.1 + 0.9 * (1 - i / 25) for i in range(1, 26)])


def test_wsd_decay_never_eats_the_warm_up() -> None:
    assert factors("wsd", warmup=50, decay=1.0)[49] == 1.0


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert factors("cosine", total=10, warmup=10) == pytest.approx([0.1 * i for i in range(1, 11)])


def test_schedule_moves_every_group_from_its_own_peak() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 4.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = build_schedule(optimizer, "linear", total_steps=4, warmup_steps=2, min_ratio=0.5)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [[0.5, 2.0], [1.0, 4.0], [0.75, 3.0], [0.5, 2.0]]
