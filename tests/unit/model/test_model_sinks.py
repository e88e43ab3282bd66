"""Sinks and the attention soft-cap against closed forms, a dense formula, numerical gradients, and each other.

Tolerances: 1e-6 for closed forms in fp32 (issue 5: numbers of order 1, some ten roundings of 6e-8); 1e-11 where both sides are fp64.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megastab.model import flash, kernels
from megastab.model.attention import attend
from megastab.model.flash import Extras, attend_with_bias, attend_with_logit, portable_with_bias, portable_with_logit
from megastab.model.kernels import Mask

CAUSAL, ALL = Mask(), Mask(is_causal=False)
F64 = torch.float64


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit: Tensor | None = None, bias: Any = None, cap: float | None = None) -> Tensor:
    """The formula, whole: logits, one more column, softmax over all, values."""
    heads, seq = q.shape[1], q.shape[2]
    repeats = heads // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    capped = (lambda x: x) if cap is None else (lambda x: cap * torch.tanh(x / cap))
    logits = capped(q @ k.mT * scale)
    seen = torch.ones(seq, k.shape[2], dtype=torch.bool).tril() if mask.is_causal else mask.seen
    if seen is not None:
        logits = logits.masked_fill(~seen, -math.inf)
    if bias is not None:
        key, value = (x.repeat_interleave(repeats, dim=0) for x in bias)
        column, values = capped((q * key[:, None]).sum(-1, keepdim=True) * scale), value[:, None].expand(q.shape[0], -1, 1, -1)
    else:
        column = (logit if logit is not None else torch.zeros(1, dtype=q.dtype))[None, :, None, None].expand(*q.shape[:2], seq, 1)
        values = torch.zeros(q.shape[0], heads, 1, q.shape[-1], dtype=q.dtype)
    return torch.cat([column, logits], dim=-1).softmax(-1) @ torch.cat([values, v], dim=2)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale).to(dtype)


def heads(n: int = 4, k: int = 2, seq: int = 13, width: int = 8, scale: float = 1.0, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    """q, k, v as the model hands them over: transposed views."""
    shapes = ((2, seq, n, width), (2, seq, k, width), (2, seq, k, width))
    return tuple(draw(*shape, seed=i, scale=scale, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes))


def terms(sink: str, n: int = 4, k: int = 2, width: int = 8, scale: float = 1.0, dtype: torch.dtype = F64) -> tuple[Any, Any]:
    """What a sink adds: (keyword arguments of ``dense``, its tensors)."""
    if sink == "kv_bias":
        bias = (draw(k, width, seed=7, scale=scale, dtype=dtype), draw(k, width, seed=8, dtype=dtype))
        return {"bias": bias}, bias
    if sink == "softmax1":
        return {"logit": None}, ()
    logit = draw(n, seed=9, scale=scale, dtype=dtype)
    return {"logit": logit}, (logit,)


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit: Tensor | None = None, bias: Any = None, cap: float | None = None) -> Tensor:
    """By whatever :mod:`flash` takes."""
    extras = Extras(cap)
    return attend_with_logit(q, k, v, mask, logit, extras) if bias is None else attend_with_bias(q, k, v, mask, bias, extras)


def portable(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit: Tensor | None = None, bias: Any = None) -> Tensor:
    return portable_with_logit(q, k, v, mask, logit) if bias is None else portable_with_bias(q, k, v, mask, bias)


def weights_of(logits: list[float], **sink: Any) -> Tensor:
    """The weights of one query with these logits, read off identity values."""
    n = len(logits)
    q = torch.ones(1, 1, 1, n) / n * n**0.5
    k = torch.tensor(logits)[None, None, :, None].expand(1, 1, n, n)
    return ours(q, k, torch.eye(n)[None, None], ALL, **sink)[0, 0, 0]


SOFTMAX1: dict[str, Any] = {"logit": None}


@pytest.mark.parametrize(
    ("logits", "sink", "want"),
    [
        ([0.0, 0.0, 0.0], SOFTMAX1, [0.25, 0.25, 0.25]),
        ([1.0, 2.0, 3.0], SOFTMAX1, [0.0871443187, 0.2368828181, 0.6439142599]),
        ([-5.0, -5.0, -5.0], SOFTMAX1, [0.0066044458] * 3),
        ([100.0, 100.0, 0.0], SOFTMAX1, [0.5, 0.5, 0.0]),
        ([-1000.0, -1000.0], SOFTMAX1, [0.0, 0.0]),
        ([1.0, 2.0, 3.0], {"logit": torch.tensor([2.0])}, [0.0723294881, 0.1966119332, 0.5344466454]),
    ],
)
def test_closed_forms_of_a_logit(logits: list[float], sink: Any, want: list[float]) -> None:
    torch.testing.assert_close(weights_of(logits, **sink), torch.tensor(want), rtol=0, atol=1e-6)


def test_closed_form_of_the_gradient() -> None:
    q, k = torch.tensor([[[[1.0, 0.0, 0.0]]]]) * 3**0.5, torch.zeros(1, 1, 3, 3)
    k[0, 0, :, 0] = torch.tensor([1.0, 2.0, 3.0])
    k.requires_grad_()
    ours(q, k, torch.eye(3)[None, None], ALL, **SOFTMAX1)[..., 0].sum().backward()
    assert k.grad is not None
    torch.testing.assert_close(k.grad[0, 0, :, 0], torch.tensor([0.0795501865, -0.0206429918, -0.0561134695]), rtol=0, atol=1e-6)


def test_closed_forms_of_a_kv_bias() -> None:
    q, k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None], torch.eye(2)[None, None]
    v = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    bias = (torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    want = torch.tensor([[-0.33952310, 0.66047690], [0.12810780, 1.12810780]])
    torch.testing.assert_close(ours(q, k, v, CAUSAL, bias=bias)[0, 0], want, rtol=0, atol=1e-6)
    nothing = (torch.zeros(1, 2), torch.zeros(1, 2))
    torch.testing.assert_close(ours(q, k, v, CAUSAL, bias=nothing)[0, 0, 1], torch.tensor([1.24825508, 2.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("logits", "capped"), [([10.0, 50.0, 100.0], [9.868766, 38.079708, 48.201379])])
def test_closed_form_of_the_cap(logits: list[float], capped: list[float]) -> None:
    # Weights are exp(capped - lse): their logarithms' differences are the capped logits' differences.
    found = weights_of(logits, logit=torch.full((1,), -math.inf), cap=50.0).double().log().diff()
    torch.testing.assert_close(found, torch.tensor(capped, dtype=F64).diff(), rtol=0, atol=2e-5)  # 6e-8 of a logit of 50, and a log


SINKS = ("softmax1", "learned", "kv_bias")
GROUPS = [(4, 4), (4, 2), (4, 1)]


@pytest.mark.parametrize("mask", [CAUSAL, ALL, Mask(False, torch.ones(13, 13, dtype=torch.bool).tril(2))], ids=["causal", "all", "seen"])
@pytest.mark.parametrize(("n", "k"), GROUPS)
@pytest.mark.parametrize("sink", SINKS)
def test_every_form_is_the_dense_formula(sink: str, n: int, k: int, mask: Mask) -> None:
    qkv, (named, _) = heads(n, k), terms(sink, n, k)
    want = dense(*qkv, mask, **named)
    for form in (ours, portable):
        torch.testing.assert_close(form(*qkv, mask, **named), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cap", [None, 0.7], ids=["flash", "capped"])
@pytest.mark.parametrize(("n", "k"), GROUPS)
@pytest.mark.parametrize("sink", SINKS)
def test_gradients_are_numerical_ones(sink: str, n: int, k: int, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_QUERIES", 2)
    qkv, (_, tensors) = heads(n, k, seq=5, width=4), terms(sink, n, k, width=4)
    inputs = [x.clone().requires_grad_() for x in (*qkv, *tensors)]

    def run(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        return ours(q, k, v, CAUSAL, cap=cap, **({"bias": extra} if sink == "kv_bias" else {"logit": next(iter(extra), None)}))

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("chunk", [4, 13, 64])
def test_the_cap_is_the_dense_formula_whatever_the_chunk(sink: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_QUERIES", chunk)
    named = terms(sink)[0]
    for mask in (CAUSAL, ALL, Mask(False, torch.ones(13, 13, dtype=torch.bool).tril(2))):
        qkv = heads(scale=2.0)
        torch.testing.assert_close(ours(*qkv, mask, cap=1.5, **named), dense(*qkv, mask, cap=1.5, **named), rtol=0, atol=1e-11)


def gradients(form: Any, sink: str, scale: float, dtype: torch.dtype, drawn: torch.dtype) -> list[Tensor]:
    """Output and gradients in ``dtype`` of what was drawn and rounded to ``drawn``."""
    qkv = [x.to(dtype).requires_grad_() for x in heads(scale=scale, dtype=drawn)]
    kind = "bias" if sink == "kv_bias" else "logit"
    tensors = [x.to(dtype).requires_grad_() for x in terms(sink, scale=scale, dtype=drawn)[1]]
    named: dict[str, Any] = {kind: tensors if kind == "bias" else next(iter(tensors), None)}
    out = form(*qkv, CAUSAL, **named)
    (out * draw(*out.shape, seed=11, dtype=drawn).to(dtype)).sum().backward()
    found = [x.grad for x in (*qkv, *tensors) if x.grad is not None]
    return [out.detach(), *found]


@pytest.mark.parametrize("sink", SINKS)
def test_large_logits_are_exact(sink: str) -> None:
    """Logits and sinks around +-80, where exp alone would overflow fp32 and a sum without its maximum would lose the sink."""
    scale, exact32 = 4.0, torch.float32
    want = gradients(dense, sink, scale, F64, exact32)
    q, k, _ = heads(scale=scale)
    assert 80 < (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).abs().max() < 110
    for form in (ours, portable):
        for found, exact in zip(gradients(form, sink, scale, exact32, exact32), want, strict=True):
            assert (found - exact).abs().max() <= 2e-5 * exact.abs().max()  # a logit of 100 in fp32 is up to 100 * 6e-8 = 6e-6 off


@pytest.mark.parametrize("offset", [80.0, -80.0])
def test_the_sink_is_there(offset: float) -> None:
    """All logits at +-80: the sink takes nothing, or everything."""
    weights = weights_of([offset] * 3, **SOFTMAX1)
    assert float(weights.sum()) == pytest.approx(1.0 if offset > 0 else 3 * math.exp(-80), rel=1e-5)


@pytest.mark.parametrize("cap", [None, 50.0])
@pytest.mark.parametrize("sink", SINKS)
def test_a_query_that_sees_nothing_gets_its_sink(sink: str, cap: float | None) -> None:
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    seen[3] = False
    qkv = [x.requires_grad_() for x in heads()]
    named, tensors = terms(sink)
    out = ours(*qkv, Mask(False, seen), cap=cap, **named)
    want = torch.zeros(2, 4, 8, dtype=F64) if sink != "kv_bias" else tensors[1].repeat_interleave(2, 0).expand(2, 4, 8)
    torch.testing.assert_close(out[:, :, 3], want, rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)
    if sink != "kv_bias":
        assert not qkv[0].grad[:, :, 3].any()  # type: ignore[index]


def test_three_sinks_are_one_at_nothing() -> None:
    qkv = heads(dtype=torch.float32)
    zero = (torch.zeros(2, 8), torch.zeros(2, 8))
    first, *others = (ours(*qkv, CAUSAL, **s) for s in (SOFTMAX1, {"logit": torch.zeros(4)}, {"bias": zero}))
    assert all((first - other).abs().max() <= 1e-6 for other in others)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("sink", SINKS)
def test_documents_are_separate_calls(sink: str, cap: float | None) -> None:
    q, k, v = (x.transpose(1, 2) for x in heads())
    named = terms(sink)[0]
    call = partial(ours, cap=cap, **named)
    ids = torch.tensor([[0] * 5 + [1] * 8, [4] * 12 + [5]], dtype=torch.int32)
    out = attend(q, k, v, ids, call)
    for sample, (start, stop) in ((0, (0, 5)), (0, (5, 13)), (1, (0, 12)), (1, (12, 13))):
        alone = attend(*(x[sample : sample + 1, start:stop] for x in (q, k, v)), None, call)
        torch.testing.assert_close(out[sample, start:stop], alone[0], rtol=0, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The most elements any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *found])
        return out


@pytest.mark.parametrize("cap", [None, 50.0], ids=["flash", "capped"])
@pytest.mark.parametrize("sink", SINKS)
def test_memory_is_linear_in_the_sequence(sink: str, cap: float | None) -> None:
    """No operator's output, forward or backward, grows with S^2: at S = 1024 a square of logits would be 1024^2 a head."""
    found = []
    for seq in (512, 1024):
        qkv = [x.requires_grad_() for x in heads(1, 1, seq, dtype=torch.float32)]
        named, tensors = terms(sink, 1, 1, dtype=torch.float32)
        for tensor in tensors:
            tensor.requires_grad_()
        with Sizes() as sizes:
            ours(*qkv, CAUSAL, cap=cap, **named).sum().backward()
        found.append(sizes.largest)
    assert found[1] == 2 * found[0]
    assert found[1] < 2 * 1024**2  # two samples of one head


def test_the_size_watch_sees_a_square() -> None:
    qkv = heads(1, 1, 256, dtype=torch.float32)
    with Sizes() as sizes:
        dense(*qkv, CAUSAL, torch.zeros(1))
    assert sizes.largest >= 2 * 256**2


@pytest.mark.parametrize("sink", SINKS)
def test_bf16_is_the_rounded_result(sink: str) -> None:
    low = torch.bfloat16
    want = gradients(dense, sink, 1.0, F64, low)
    for form in (ours, portable):
        for found, exact in zip(gradients(form, sink, 1.0, low, low), want, strict=True):
            # probabilities, products and results are rounded to 2^-9 each
            assert (found.double() - exact).abs().max() <= 0.01 * exact.abs().max()


def test_flash_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is called, and without one the portable form is taken."""
    taken: list[str] = []
    monkeypatch.setattr(flash, "portable_with_logit", lambda *_: taken.append("portable"))
    attend_with_logit(*heads(), CAUSAL)
    assert taken == []
    monkeypatch.setattr(kernels, "FLASH", ())
    attend_with_logit(*heads(), CAUSAL)
    assert taken == ["portable"]
