"""The figure ``norms``: its arithmetic, and that each contestant does what its name says. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

from megastab.model.norms import DyT, RMSNorm
from megastab.report.bench import norms_contestants
from megastab.report.bench.norms import rows
from megastab.report.bench.norms_contestants import contestants, measure, norm_of, step_of

SECONDS = {
    "rmsnorm eager": [0.02, 0.01, 0.03],
    "dyt eager": [0.028, 0.02, 0.03],
    "rmsnorm compiled": [0.01, 0.01, 0.01],
    "dyt compiled": [0.009, 0.008, 0.03],
}


def test_rows_of_a_dtype() -> None:
    eager, compiled = rows("[8, 4] bf16", SECONDS)
    assert (eager.figure, eager.case, eager.bound, eager.verdict) == ("norms", "[8, 4] bf16 dyt over rmsnorm, eager", 1.3, "MISSED")
    assert (compiled.case, compiled.bound, compiled.verdict) == ("[8, 4] bf16 dyt over rmsnorm, compiled", 1.0, "ok")
    assert (eager.value, compiled.value) == (pytest.approx(1.4), pytest.approx(0.9))
    assert eager.detail == "28.00 ms, rmsnorm 20.00 ms; median of pairwise ratios 1.400"


def test_rows_without_a_compiler() -> None:
    eager = {name: series for name, series in SECONDS.items() if name.endswith("eager")}
    assert [row.verdict for row in rows("", eager)] == ["MISSED", "failed"]


@pytest.mark.parametrize(("kind", "built"), [("dyt", DyT), ("rmsnorm", RMSNorm)])
def test_a_step_is_forward_and_backward(kind: str, built: type) -> None:
    norm = norm_of(kind, 8, torch.bfloat16)
    assert isinstance(norm, built) and all(p.dtype == torch.bfloat16 for p in norm.parameters())
    x, dy = torch.randn(5, 8).bfloat16().requires_grad_(), torch.ones(5, 8).bfloat16()
    step = step_of(norm, x, dy)
    step()
    once = [x.grad.clone(), *(p.grad.clone() for p in norm.parameters())]
    step()
    assert all(torch.equal(a, b) for a, b in zip(once, [x.grad, *(p.grad for p in norm.parameters())], strict=True)), "nothing adds up"
    assert once[0].abs().max() > 0


def test_contestants_take_turns() -> None:
    order: list[str] = []
    found = measure({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b"] * (norms_contestants.WARMUP + 2) and {name: len(series) for name, series in found.items()} == {
        "a": 2,
        "b": 2,
    }


def test_compiled_ones_are_left_out_where_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    class Refusing(torch.nn.Module):
        forward = staticmethod(refuse)

    monkeypatch.setattr(torch, "compile", lambda _: Refusing())
    assert list(contestants(4, 8, torch.float32)) == ["rmsnorm eager", "dyt eager"]
    assert "no compiler" in capsys.readouterr().err
