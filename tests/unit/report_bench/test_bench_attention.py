"""The figure ``attention``: its arithmetic, and that each contestant computes what its name says. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

from megastab.report.bench import attention_contestants
from megastab.report.bench.attention import BOUNDS, rows
from megastab.report.bench.attention_contestants import Inputs, measure


def test_a_row_is_the_median_of_neighbouring_ratios() -> None:
    softmax1, capped = rows("bf16", {"softmax1": [[1.0, 1.0], [2.0, 2.4], [1.0, 1.3]], "capped": [[1.0, 7.0]]})
    assert (softmax1.figure, softmax1.case, softmax1.bound, softmax1.verdict) == ("attention", "bf16 softmax1 over plain", 1.1, "MISSED")
    assert softmax1.value == pytest.approx(1.2)
    assert "1300.0 ms, plain 1000.0 ms; ratio of medians 1.300" in softmax1.detail
    assert (capped.value, capped.verdict) == (7.0, "")


def test_contestants_compute_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_contestants, "SEQ", 16)
    inputs = Inputs(torch.float32, 1)
    forms = inputs.forms()
    assert forms.keys() == {"plain", *BOUNDS}
    results = {who: form() for who, form in forms.items() if "compiled" not in who}
    for sink in ("softmax1", "learned", "kv_bias"):
        torch.testing.assert_close(results[sink], results[f"portable {sink}"], rtol=1e-5, atol=1e-5)
    kinds = [results[who] for who in ("plain", "softmax1", "learned", "kv_bias")]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(kinds) for b in kinds[:i])
    assert (results["capped"] - results["softmax1"]).abs().max() > 1e-4  # a cap of 50 on logits of a few: some logit^3 / 7500


def test_each_contestant_follows_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, *_: object):
            pass

        def forms(self) -> dict[str, str]:
            return {who: who for who in ("plain", "a", "b")}

        def seconds(self, form: str) -> float:
            order.append(form)
            return float(len(order))

    monkeypatch.setattr(attention_contestants, "Inputs", Fake)
    taken = measure("fp32", 1, 2, ["a", "b"])
    assert order == ["plain", "a", "plain", "b"] * 4  # two rounds to warm up
    assert taken == {"a": [[9.0, 10.0], [13.0, 14.0]], "b": [[11.0, 12.0], [15.0, 16.0]]}
