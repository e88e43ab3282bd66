"""What lies between the look-up and the blocks: factor, positions, norm; and the head's soft cap, in the network and in its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.load import load_config
from megastab.model.counts import entrance, layer_costs
from megastab.model.init import init_weights
from megastab.model.loss import cross_entropy, soft_cap
from megastab.model.stages import layer_specs
from megastab.parallel.grid import ALONE
from tests.layouts import GPT, LLAMA, SINGLE, config_of
from tests.oracle.models import build, logical

NORMED, TIMES_3, DYT = {"embedding_norm": True}, {"embedding_multiplier": 3.0}, {"norm": "dyt"}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ({**LLAMA}, []),
        ({**GPT}, ["positions"]),
        ({**LLAMA, **NORMED}, ["norm"]),
        ({**GPT, **NORMED}, ["positions"]),
        ({**LLAMA, **TIMES_3}, ["scale"]),
        ({**GPT, **TIMES_3}, ["scale", "positions"]),
        ({**LLAMA, **DYT, **NORMED}, ["scale", "norm"]),
        ({**LLAMA, **DYT, "dyt": {"embedding_scale": False}}, []),
    ],
)
@pytest.mark.parametrize("position", ["pre", "post"])
def test_pipeline_has_a_cost_for_every_layer(model: dict, layers: list[str], position: str) -> None:
    config = load_config(config_of(SINGLE, model={**model, "norm_position": position}), world_size=1).megastab
    specs, costs = layer_specs(config, ALONE)
    assert entrance(config.model) == layers
    assert len(specs) == len(costs) == 1 + len(layers) + 2 + (position == "pre") + 1
    assert costs == layer_costs(config.model) and costs[0] == costs[len(layers)] == 0 < costs[len(layers) + 1]


def first_input(network: nn.Module, tokens: Tensor) -> Tensor:
    """What the first block is given."""
    seen: list[Tensor] = []
    handle = network.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.logits(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("changes", [{}, NORMED, TIMES_3, {**DYT, **NORMED}, {**DYT, **TIMES_3}], ids=str)
def test_entrance_is_factor_positions_norm(model: dict, changes: dict[str, Any]) -> None:
    if model is GPT and changes == NORMED:
        changes = {**NORMED, **TIMES_3}
    network = build({**model, **changes})
    init_weights(network, network.config, 0)
    for name, values in logical(network).items():
        if "norm" in name or "scale" in name:
            nn.init.normal_(values, 1.0, 0.3)
    tokens, values = torch.randint(0, 100, (2, 16)), logical(network)
    wanted = values["embedding"][tokens.reshape(-1)] * changes.get("embedding_multiplier", 1.0)
    if "norm" in changes:
        wanted = wanted * values["embedding_scale"]
    if model is GPT:
        wanted = wanted + values["positions"].repeat(2, 1)
    if "embedding_norm" in changes:
        gain, bias = values["embedding_norm"], values.get("embedding_norm.bias")
        if "norm" in changes:
            wanted = gain * torch.tanh(values["embedding_norm.alpha"] * wanted) + bias
        else:
            wanted = F.layer_norm(wanted, (32,), gain, bias, 1e-5) if model is GPT else F.rms_norm(wanted, (32,), gain, 1e-5)
    torch.testing.assert_close(first_input(network, tokens), wanted, rtol=1e-5, atol=1e-5)


def test_learned_scale_has_its_gradient_in_bf16() -> None:
    """The gradient is one sum of products, rounded to bf16 once (2^-9). Half of these are 193.5/128, halfway between two bf16 numbers, and
    half are -192/128: rounded one by one their sum is a third too large."""
    network = build({**LLAMA, **DYT, "hidden_size": 64})
    init_weights(network, network.config, 0)
    scale = network.scale.bfloat16()
    x = torch.tensor([[129 / 128], [1.0]], dtype=torch.bfloat16).repeat(32, 64)
    dy = torch.tensor([[1.5], [-1.5]], dtype=torch.bfloat16).repeat(32, 64)
    y = scale(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16 and torch.equal(y, (x * 8.0))
    torch.testing.assert_close(scale.weight.grad.double(), (x.double() * dy.double()).sum().view(1), rtol=2**-9, atol=0)


@pytest.mark.parametrize(
    ("cap", "wanted"), [(50.0, [9.868766, 38.079708, 48.201379]), (30.0, [9.645382, 22.847825, 29.923739])], ids=["50", "30"]
)
def test_soft_cap_at_points_computed_by_hand(cap: float, wanted: list[float]) -> None:
    x = torch.tensor([10.0, 50.0, 100.0] if cap == 50 else [10.0, 30.0, 100.0])
    torch.testing.assert_close(soft_cap(x, cap), torch.tensor(wanted), rtol=1e-6, atol=0)


def test_z_loss_at_a_point_computed_by_hand() -> None:
    x, labels, weights = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True), torch.tensor([1]), torch.ones(1)
    plain, with_z = cross_entropy(x, labels, weights, 3), cross_entropy(x, labels, weights, 3, 1e-4)
    assert float(plain) + 2.0 == pytest.approx(3.4076059644, abs=1e-6)
    assert float(with_z - plain) == pytest.approx(0.0011611778, abs=1e-6)
    (gradient,) = torch.autograd.grad(with_z - plain, x)
    torch.testing.assert_close(gradient, torch.tensor([[6.135774e-5, 1.6678764e-4, 4.5337581e-4]]), rtol=0, atol=1e-7)


TOKENS, VOCAB, PADDED = 7, 11, 16


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(TOKENS, PADDED, generator=draw, dtype=torch.float64)
    labels, weights = torch.randint(0, VOCAB, (TOKENS,), generator=draw), torch.rand(TOKENS, generator=draw)
    return logits.to(dtype).requires_grad_(), labels, weights.double()


def definition(logits: Tensor, labels: Tensor, weights: Tensor, z_loss: float, cap: float) -> Tensor:
    capped = cap * torch.tanh(logits[:, :VOCAB] / cap)
    lse = capped.logsumexp(-1)
    return (weights * (lse - capped.gather(1, labels[:, None])[:, 0] + z_loss * lse.square())).sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_capped_loss_is_its_definition_and_its_gradient_the_numerical_one(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastab.model.loss.CHUNK_ELEMENTS", {"cpu": 2 * VOCAB})
    logits, labels, weights = problem(torch.float64)
    loss = cross_entropy(logits, labels, weights, VOCAB, z_loss, softcap=30.0)
    torch.testing.assert_close(loss, definition(logits, labels, weights, z_loss, 30.0), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, weights, VOCAB, z_loss, softcap=30.0), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_loss_computes_in_fp32(dtype: torch.dtype) -> None:
    """1e-6 is some fp32 roundings; a bf16 gradient is rounded once more, to 2^-9 of each entry."""
    logits, labels, weights = problem(dtype)
    exact = logits.detach().double().requires_grad_()
    loss, wanted = cross_entropy(logits, labels, weights, VOCAB, 0.01, softcap=30.0), definition(exact, labels, weights, 0.01, 30.0)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(logits.grad[:, :VOCAB].double(), exact.grad[:, :VOCAB], **tolerance)


def test_logits_are_capped_as_the_loss_caps_them() -> None:
    """A cap well inside the range of the logits: a loss on ``logits`` as they are is the model's own."""
    model, plain = (build({**LLAMA, **changes}) for changes in ({"logit_softcap": 0.5}, {}))
    for network in (model, plain):
        init_weights(network, network.config, 3)
    draw = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 100, (2, 16), generator=draw) for _ in "ab")
    free, capped = plain.logits(tokens), model.logits(tokens)
    assert free.abs().max() > 1 and 0.4 < capped.abs().max() <= 0.5
    torch.testing.assert_close(capped, 0.5 * torch.tanh(free / 0.5), rtol=1e-6, atol=1e-6)
    loss, expected = model(tokens, labels, torch.ones(2, 16)), cross_entropy(capped, labels, torch.ones(2, 16), 100)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
