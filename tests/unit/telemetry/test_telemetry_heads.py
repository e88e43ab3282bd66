"""What is kept of a head's attention is what the dense softmax over all keys says, however the queries are cut into chunks.

The oracle works in fp64, query by query and key by key. Tolerances: logits are fp32 (6e-8 relative, of size up to 30 here), so that weights
and what is summed from them agree to 1e-5.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megastab.telemetry import heads
from megastab.telemetry.heads import FIELDS, Head, first_keys, heads_seen, layer_facts, layer_scalars, query_positions

SEQ, HEADS, KV_HEADS, WIDTH = 40, 6, 2, 16
DOCUMENTS = torch.tensor([0] * 7 + [1] + [2] * 20 + [3] * 12)


def dense(q: Tensor, k: Tensor, first: list[int], last: list[int], sink: np.ndarray | None, cap: float | None) -> list[Head]:
    """The definition, in fp64: q [Q, N, H], k [L, K, H], sink [N, Q]."""
    queries, keys = q.double().numpy(), k.double().numpy()
    found = []
    for head in range(q.shape[1]):
        rows = []
        for row, (begin, end) in enumerate(zip(first, last, strict=True)):
            x = keys[begin : end + 1, head * k.shape[1] // q.shape[1]] @ queries[row, head] / math.sqrt(q.shape[2])
            x = x if cap is None else cap * np.tanh(x / cap)
            outcomes = x if sink is None else np.append(x, sink[head, row])
            p = np.exp(outcomes - outcomes.max())
            p /= p.sum()
            is_first = float(x[0] > x[1:].max()) if len(x) > 1 else math.nan
            rows.append((x.max(), -(p * np.log(p)).sum(), p[0], 1 / len(p), is_first, math.nan if sink is None else p[-1]))
        columns = list(zip(*rows, strict=True))
        is_first = np.array(columns[4])
        found.append(
            Head(max(columns[0]), *(float(np.mean(c)) for c in columns[1:4]), float(np.nanmean(is_first)), float(np.mean(columns[5])))
        )
    return found


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    q, k = (torch.randn(SEQ, n, WIDTH, generator=draw) for n in (HEADS, KV_HEADS))
    k[[0, 7, 8, 28]] *= 3.0  # so that some queries are drawn to the first key of their document
    return (2 * q).to(dtype), k.to(dtype)


@pytest.mark.parametrize("chunk", [1, 3 * HEADS * SEQ, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_it_is_the_dense_softmax(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, has_documents: bool, has_sink: bool, cap: float | None
) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(heads, "QUERIES", 11)
    q, k = drawn(dtype)
    last = query_positions(SEQ)
    first = first_keys(DOCUMENTS)[last] if has_documents else torch.zeros_like(last)
    sink = torch.linspace(-2, 4, HEADS * len(last)).view(HEADS, len(last)) if has_sink else None
    seen = heads_seen(q[last], k, first, last, sink, cap)
    expected = dense(q[last], k, first.tolist(), last.tolist(), None if sink is None else sink.double().numpy(), cap)
    assert seen.dtype == torch.float64 and seen.shape == (HEADS, FIELDS)
    assert seen.tolist() == pytest.approx(np.array(expected), rel=1e-5, abs=1e-7, nan_ok=True)
    assert 0 < np.mean([head.first_key_share for head in expected]) < 1, "the share can be wrong"


@pytest.mark.parametrize(("seq", "plain", "with_zero"), [(8, 0.339732, 0.228621), (64, 0.074123, 0.058739), (256, 0.023923, 0.020032)])
def test_uniform_attention_has_the_golden_masses(seq: int, plain: float, with_zero: float) -> None:
    q, k, everyone, first = torch.zeros(seq, 2, 8), torch.randn(seq, 1, 8), torch.arange(seq), torch.zeros(seq, dtype=torch.long)
    for sink, golden in ((None, plain), (torch.zeros(2, seq), with_zero)):
        for largest, entropy, mass, uniform, share, sink_mass in heads_seen(q, k, first, everyone, sink).tolist():
            assert mass == pytest.approx(golden, abs=1e-6) and uniform == pytest.approx(mass, rel=1e-6)
            assert (largest, share) == (0.0, 0.0), "a tie is no maximum"
            extra = 0 if sink is None else 1
            assert entropy == pytest.approx(np.mean(np.log(np.arange(1, seq + 1) + extra)), rel=1e-6)
            assert sink_mass == pytest.approx(mass) if sink is not None else math.isnan(sink_mass)
    if seq <= heads.QUERIES:
        assert query_positions(seq).tolist() == everyone.tolist(), "the masses of a short sequence are those of all its queries"


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 100, 1000, 2048, 131072])
def test_positions_are_spread_evenly(seq: int) -> None:
    places = query_positions(seq).tolist()
    assert len(places) == min(seq, 64) and places == sorted(set(places)) and places[0] >= 0 and places[-1] < seq
    gaps = np.diff([-1, *places, seq])
    assert gaps[1:-1].max(initial=1) - gaps[1:-1].min(initial=seq) <= 1 and abs(gaps[0] - gaps[-1]) <= 2


def test_documents_begin_where_their_ids_change() -> None:
    assert first_keys(torch.tensor([4, 4, 7, 7, 7, 4, 9])).tolist() == [0, 0, 2, 2, 2, 5, 6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    q, k = drawn()
    q[20, 3, 0] = bad
    last = torch.arange(SEQ)
    seen = heads_seen(q, k, torch.zeros_like(last), last)
    assert not torch.isfinite(seen[3, :3]).any() and math.isnan(seen[3, 4]) and torch.isfinite(seen[[0, 1, 2, 4, 5], :5]).all()
    found = [Head(*row) for row in seen.tolist()]
    assert not math.isfinite(layer_scalars(found)["largest_logit"]) and math.isnan(layer_scalars(found)["entropy_min"])
    row = json.loads(json.dumps(layer_facts(1, found), allow_nan=False))
    assert row["largest_logit"][3] is None and row["largest_logit"][2] > 0 and "sink_mass" not in row


def test_only_documents_of_one_token_leave_no_share() -> None:
    q, k = drawn()
    last = torch.arange(SEQ)
    seen = heads_seen(q, k, last, last)
    assert torch.isnan(seen[:, 4]).all() and seen[:, 1:4].tolist() == [[0.0, 1.0, 1.0]] * HEADS


def test_a_layer_is_its_heads() -> None:
    found = [Head(3.0, 1.0, 0.5, 0.1, 0.2, 0.3), Head(5.0, 0.25, 0.7, 0.1, 0.6, 0.5)]
    assert layer_scalars(found) == pytest.approx(
        {"largest_logit": 5.0, "entropy": 0.625, "entropy_min": 0.25, "first_key_mass": 0.6, "first_key_mass_max": 0.7,
         "first_key_share": 0.4, "sink_mass": 0.4}
    )  # fmt: skip
    assert layer_facts(2, found) == {
        "layer": 2, "largest_logit": [3.0, 5.0], "entropy": [1.0, 0.25], "first_key_mass": [0.5, 0.7], "first_key_share": [0.2, 0.6],
        "sink_mass": [0.3, 0.5], "first_key_uniform": 0.1,
    }  # fmt: skip
