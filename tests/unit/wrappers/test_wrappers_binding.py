"""Engines we do not drive are refused by name, before anything is changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from megastab.parallel.grid import Grid
from megastab.parallel.param_info import ParamInfo, Part
from megastab.wrappers import adapter, bind
from megastab.wrappers.bf16 import BF16Adapter


def engine_with(optimizer: Any) -> Any:
    return SimpleNamespace(optimizer=optimizer, module=nn.Linear(2, 2), gradient_clipping=lambda: 1.0)


def test_unknown_wrapper_is_refused_by_name() -> None:
    with pytest.raises(adapter.UnsupportedEngine, match="does not drive DeepSpeed's FP16_UnfusedOptimizer; use ZeRO stage 1"):
        bind.bind(engine_with(type("FP16_UnfusedOptimizer", (), {})()), Grid())


def test_other_version_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1")
    with pytest.raises(adapter.UnsupportedEngine, match=r"found 0\.20\.1: pip install deepspeed==0\.19\.8"):
        bind.bind(engine_with(torch.optim.SGD([torch.zeros(1)], lr=1.0)), Grid())


def test_local_build_of_the_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", f"{adapter.DEEPSPEED_VERSION}+abc123")
    adapter.check_version()


def test_missing_attributes_are_named() -> None:
    lacking = SimpleNamespace(bf16_groups=[], clip_grad=0.0)
    with pytest.raises(adapter.UnsupportedEngine, match="lacks fp32_groups_gradients, .*update_lp_params"):
        BF16Adapter(engine_with(lacking))


def test_range_of_a_fused_parameter_is_cut_into_its_matrices() -> None:
    """Rows 0-3 of a, 4-5 of b, width 3; elements [10, 16) end a and begin b."""
    info = ParamInfo((Part("a", "q", 8, 4, 4), Part("b", "k", 4, 2, 2)), layer=0, width=3)
    master = torch.arange(10.0, 16.0)
    pieces = list(adapter.split_parts(nn.Parameter(torch.zeros(6, 3)), info, 10, master, master.half()))
    assert [(p.part.name, p.start, p.master.tolist()) for p in pieces] == [("a", 10, [10.0, 11.0]), ("b", 0, [12.0, 13.0, 14.0, 15.0])]
    assert pieces[1].low.tolist() == [12.0, 13.0, 14.0, 15.0] and pieces[1].master.data_ptr() == master[2:].data_ptr(), "views"


def test_foreign_parameters_are_one_matrix_of_their_name() -> None:
    info = adapter.foreign_info(nn.Parameter(torch.zeros(4, 3, 2)), "conv.weight")
    assert (info.name, info.parts[0].rows, info.width, info.decays) == ("conv.weight", 4, 6, True)
    vector = adapter.foreign_info(nn.Parameter(torch.zeros(5)), "bias")
    assert (vector.parts[0].rows, vector.width, vector.decays) == (5, None, False)


@pytest.mark.parametrize("length", [1, 4095, 4096, 3_000_001])
def test_norm_of_block_norms_is_the_norm(length: int) -> None:
    """Heavy-tailed, as gradients are; 1e-6 where torch's own fp32 norm on CPU is 1e-4 off at this length."""
    torch.manual_seed(0)
    gradient = torch.randn(length) * torch.randn(length).exp().square()
    assert float(adapter.block_norms([gradient])[0].norm()) == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    assert not float(adapter.block_norms([torch.tensor([1.0, float("nan")])])[0].norm()) < float("inf")
