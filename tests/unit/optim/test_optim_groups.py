"""Matrices decay, gains and biases do not, as few groups as can be; the optimizer is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megastab.optim.groups import build_optimizer, decay_groups, decays, describe_groups
from megastab.parallel.param_info import info_of
from tests.layouts import GPT
from tests.oracle.models import build


def test_groups_split_by_role() -> None:
    model = build(GPT)
    decayed, rest = decay_groups(model.parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    roles = [{info_of(p).parts[0].role for p in group["params"]} for group in (decayed, rest)]
    assert roles == [{"embedding", "position", "q", "o", "up", "down"}, {"norm", "bias"}]
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_one_group_without_decay() -> None:
    (group,) = decay_groups(build(GPT).parameters(), 0.0)
    assert len(group["params"]) == len(list(build(GPT).parameters()))


def test_empty_groups_and_frozen_parameters_are_left_out() -> None:
    vectors = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)]
    (group,) = decay_groups(vectors, 0.1)
    assert group["weight_decay"] == 0.0 and group["params"] == vectors[:1]


def test_foreign_parameters_are_judged_by_their_dimensions() -> None:
    assert decays(nn.Parameter(torch.zeros(2, 2))) and not decays(nn.Parameter(torch.zeros(2)))
    partitioned = nn.Parameter(torch.zeros(0))
    partitioned.ds_shape = torch.Size([4, 4])
    assert decays(partitioned), "ZeRO-3 leaves an empty tensor and says the shape"


def test_description_names_roles() -> None:
    said = describe_groups(decay_groups(build(GPT).parameters(), 0.1))
    assert "decay 0.1 (down, embedding, k, o, position, q, up, v)" in said and "decay 0 (bias, norm)" in said


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("AdamW", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}),
        ("Adam", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ],
)
def test_optimizer_is_torchs_with_the_written_arguments(kind: str, params: dict) -> None:
    optimizer = build_optimizer(kind, params, build(GPT).parameters())
    assert type(optimizer) is getattr(torch.optim, kind) and optimizer.defaults["fused"] is True
    for key, value in params.items():
        assert optimizer.param_groups[0][key] == value


def test_decay_reaches_matrices_only() -> None:
    model = build(GPT)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    build_optimizer("AdamW", {"lr": 0.5, "weight_decay": 0.1}, model.parameters()).step()
    for p in model.parameters():
        assert torch.allclose(p, torch.full_like(p, 0.95 if decays(p) else 1.0)), info_of(p).name
