"""Query and key norms, output gates and sinks inside the model: against their formulas, each other, and the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.model.attention import Attention, _gated
from megastab.model.context import Context
from megastab.model.init import init_weights
from megastab.model.rope import rope_table, rotate
from megastab.model.transformer import Transformer
from megastab.optim.groups import decays
from megastab.parallel.grid import ALONE
from megastab.stability.tvr import TVR
from tests.layouts import GPT, LLAMA
from tests.oracle.models import build, logical

GQA = {**LLAMA, "num_kv_heads": 2}
LAYER = "layers.0.attention"


def drawn(model: dict[str, Any], **block: Any) -> Transformer:
    """Every parameter random, gains around 1."""
    out = build(model, **block)
    init_weights(out, out.config, 1)
    torch.manual_seed(0)
    for parameter in out.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return out


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:], torch.ones(3, 16) / 48, torch.arange(3)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


@pytest.mark.parametrize("gate", ["none", "head", "element"])
@pytest.mark.parametrize("sink", ["none", "softmax1", "learned", "kv_bias"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("base", [GQA, {**GPT, "num_kv_heads": 1}], ids=["llama", "gpt"])
def test_attention_is_its_formula(base: dict[str, Any], qk_norm: str, sink: str, gate: str) -> None:
    model = drawn({**base, "qk_norm": qk_norm, "sink": sink, "output_gate": gate})
    attention, parts = model.blocks[0].attention, {name.removeprefix(f"{LAYER}."): w for name, w in logical(model).items()}
    x, config = torch.randn(2 * 16, 32), model.config

    def project(name: str) -> Tensor:
        return F.linear(x, parts[name], parts.get(f"{name}.bias"))

    q, k, v = (project(name).view(2, 16, -1, 8) for name in "qkv")
    keys = [k] + ([parts["sink_key"].view(1, 1, -1, 8)] if sink == "kv_bias" else [])
    if qk_norm == "head":
        q, keys = rms(q, parts["q_norm"]), [rms(key, parts["k_norm"]) for key in keys]
    elif qk_norm == "full":
        q, keys = (
            rms(q.flatten(2), parts["q_norm"]).view(q.shape),
            [rms(key.flatten(2), parts["k_norm"]).view(key.shape) for key in keys],
        )
    if config.arch == "llama":
        table = rope_table(16, 8, config.rope_theta, x.device)
        q, keys[0] = rotate(q, table), rotate(keys[0], table)
    repeats = 4 // config.num_kv_heads
    logits = torch.einsum("bsnh,btnh->bnst", q, keys[0].repeat_interleave(repeats, 2)) / 8**0.5
    logits = logits.masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -torch.inf)
    values = v.repeat_interleave(repeats, 2)
    if sink == "kv_bias":
        column = torch.einsum("bsnh,nh->bns", q, keys[1][0, 0].repeat_interleave(repeats, 0))[..., None] / 8**0.5
        values = torch.cat([values, parts["sink_value"].view(1, 1, -1, 8).repeat_interleave(repeats, 2).expand(2, -1, -1, -1)], dim=1)
        weights = torch.cat([logits, column], dim=-1).softmax(-1)
    elif sink == "none":
        weights = logits.softmax(-1)
    else:
        extra = parts["sink"] if sink == "learned" else torch.zeros(4)
        weights = torch.cat([logits, extra.view(1, 4, 1, 1).expand(2, 4, 16, 1)], dim=-1).softmax(-1)[..., :-1]
    want = torch.einsum("bnst,btnh->bsnh", weights, values)
    if gate == "head":
        want = want * project("output_gate").sigmoid().view(2, 16, 4, 1)
    elif gate == "element":
        want = want * project("output_gate").sigmoid().view(2, 16, 4, 8)
    want = want.reshape(32, 32) @ parts["o"] + parts.get("o.bias", torch.zeros(32))
    torch.testing.assert_close(attention(x, Context(2, 16)), want, rtol=1e-5, atol=2e-6)  # fp32, some hundred roundings


def test_a_gate_of_zero_halves() -> None:
    out = torch.randn(5, 12)
    assert torch.equal(_gated(out, torch.zeros(5, 3)), out / 2) and torch.equal(_gated(out, torch.zeros(5, 12)), out / 2)


@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_softmax1_learned_and_kv_bias_start_and_stay_equal(arch: str) -> None:
    """At s = 0 and k' = v' = 0 the three are one model; with their own parameters held there, training keeps them so."""
    models = [build({**GQA, "arch": arch, "sink": sink}) for sink in ("softmax1", "learned", "kv_bias")]
    losses: list[list[float]] = []
    for model in models:
        init_weights(model, model.config, 1)
        for name, parameter in model.named_parameters():
            if ".sink." in name:
                nn.init.zeros_(parameter)
        weights = [p for name, p in model.named_parameters() if ".sink." not in name]
        optimizer, seen = torch.optim.SGD(weights, lr=0.1, momentum=0.9), []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(*batch())
            loss.backward()
            optimizer.step()
            seen.append(float(loss))
        losses.append(seen)
    assert losses[0][-1] < losses[0][0] - 0.05, "nothing was trained"
    for other in losses[1:]:
        assert max(abs(a - b) for a, b in zip(losses[0], other, strict=True)) <= 1e-6 * losses[0][0]
    first = logical(models[0])
    for model in models[1:]:
        assert all((value - first[name]).abs().max() <= 1e-6 for name, value in logical(model).items() if name in first)


@pytest.mark.parametrize("variant", [{"sink": "learned"}, {"sink": "kv_bias"}, {"qk_norm": "head"}, {"qk_norm": "full"}], ids=str)
def test_vectors_do_not_decay_and_gates_do(variant: dict[str, Any]) -> None:
    model = build({**LLAMA, **variant, "output_gate": "head"})
    mine = [p for name, p in model.named_parameters() if any(x in name for x in ("sink", "q_norm", "k_norm"))]
    assert mine and not any(decays(p) for p in mine)
    assert decays(model.blocks[0].attention.qkv.weight)


def test_tvr_leaves_sinks_norms_and_output_gates_alone() -> None:
    model = build({**LLAMA, "sink": "kv_bias", "qk_norm": "head", "output_gate": "element"})
    catalogue = [(p.megastab_info, part) for p in model.parameters() for part in p.megastab_info.parts]  # type: ignore[attr-defined]
    roles = {part.role for _, part in TVR().selected(catalogue)}
    assert roles == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(recompute: str) -> None:
    model = {**GQA, "sink": "kv_bias", "qk_norm": "full", "output_gate": "head", "attention_softcap": 2.0}
    plain, again = drawn(model), drawn(model, parallel={"recompute": recompute})
    for network in (plain, again):
        network(*batch()).backward()
    grads = logical(plain, "grad")
    assert all(torch.equal(value, grads[name]) for name, value in logical(again, "grad").items())


def test_every_parameter_of_a_variant_is_trained() -> None:
    for variant in ({"sink": "learned", "qk_norm": "head", "output_gate": "element"}, {"sink": "kv_bias", "qk_norm": "full"}):
        model = drawn({**GQA, **variant})
        model(*batch()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_plain_model_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("not on the plain path")

    for name in ("attend_with_logit", "attend_with_bias", "_gated"):
        monkeypatch.setattr(f"megastab.model.attention.{name}", refused)
    attention = Attention(build(GQA).config, ALONE, 0)
    assert attention.q_norm is None and attention.sink is None and attention.gates == 0
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    attention(torch.randn(32, 32), Context(2, 16))
