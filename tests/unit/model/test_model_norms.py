"""Dynamic tanh and where a block's norms are: closed forms, gradients, and a plain-torch reference of every position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig
from megastab.model import norms
from megastab.model.block import Block
from megastab.model.context import Context
from megastab.model.init import init_weights
from megastab.model.norms import DyT, build_norm, dyt_alpha
from megastab.optim.groups import decay_groups
from megastab.parallel.grid import ALONE
from megastab.parallel.param_info import info_of
from tests.layouts import GPT, LLAMA
from tests.oracle.models import build, logical


def dyt(width: int, alpha: float, gain: float = 1.0, bias: float = 0.0) -> DyT:
    module = DyT("n", width, alpha, ALONE, None)
    for parameter, value in ((module.alpha, alpha), (module.weight, gain), (module.bias, bias)):
        parameter.data.fill_(value)
    return module


def formula(x: Tensor, alpha: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return gain * torch.tanh(alpha * x) + bias


def test_dyt_at_points_computed_by_hand() -> None:
    x = torch.tensor([[-100, -2, -0.5, 0, 0.5, 2, 100]])
    wanted = torch.tensor([[-1, -0.7615941560, -0.2449186624, 0, 0.2449186624, 0.7615941560, 1]])
    torch.testing.assert_close(dyt(7, 0.5)(x), wanted, rtol=0, atol=1e-6)
    found = dyt(2, 0.8, gain=1.5, bias=0.1)(torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0960551554, -1.2825028316]]), rtol=0, atol=1e-6)


def test_dyt_gradient_at_a_point_computed_by_hand() -> None:
    module, x = dyt(2, 0.5), torch.tensor([[1.0, -2.0]], requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.3932238665, 0.2099871708]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(module.alpha.grad, torch.tensor([-0.0535009503]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_compiling", [False, True], ids=["eager", "the formula that is compiled"])
def test_dyt_gradient_is_the_numerical_one(is_compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    monkeypatch.setattr(norms, "CHUNK_ELEMENTS", 2 * 5)  # 7 rows: four chunks, the last one short
    draw = torch.Generator().manual_seed(0)
    module = dyt(5, 0.7).double()
    leaves = [torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in ((7, 5), (5,), (5,))]
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, gain: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": gain, "bias": bias, "alpha": alpha}, x)

    tolerance = 2e-7 if is_compiling else 1e-12  # the compiler's tanh is made for fp32
    torch.testing.assert_close(run(*leaves, alpha), formula(leaves[0], alpha, *leaves[1:]), rtol=tolerance, atol=tolerance)
    assert torch.autograd.gradcheck(run, (*leaves, alpha))


@pytest.mark.parametrize("is_compiling", [False, True], ids=["eager", "the formula that is compiled"])
def test_dyt_in_bf16_has_a_gradient_where_tanh_rounds_to_one(is_compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 tanh is exactly 1 from 3.5 on. 2^-7: one bf16 rounding (2^-9), and that of fp32 in 1 - tanh^2 (6e-8 of 7e-5 at 5.5)."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    module = dyt(4, 0.5, gain=1.25).bfloat16()
    x = torch.tensor([[8.0, -9.0, 10.0, -11.0], [0.5, 7.5, -9.5, 10.5]], dtype=torch.bfloat16, requires_grad=True)
    dy = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.25, 1.0, 3.0, 1.0]], dtype=torch.bfloat16)
    assert (torch.tanh(0.5 * x[0]).abs() == 1).all()
    exact = [p.detach().double().requires_grad_() for p in (x, module.alpha, module.weight, module.bias)]
    y = module(x)
    y.backward(dy)
    formula(*exact).backward(dy.double())
    found = (x, module.alpha, module.weight, module.bias)
    assert y.dtype == torch.bfloat16 and (x.grad != 0).all()
    for mine, wanted in zip(found, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=2**-7, atol=0)


def test_tanh_for_the_compiler_is_tanh_in_fp32() -> None:
    """4e-7, some seven roundings of 6e-8 (the largest error is beside 0.2), also of results near 0."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 30, 4001), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    found, exact = norms._tanh(z), torch.tanh(z.double())
    assert ((found - exact).abs() <= 4e-7 * exact.abs()).all() and norms._tanh(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dyt_is_the_eager_one(dtype: torch.dtype) -> None:
    """fp32: sums of 48 in another order, and tanh's last bits; bf16: both round the same fp32 values, now and then to neighbours."""
    draw = torch.Generator().manual_seed(0)
    x, dy = (2 * torch.randn(48, 32, generator=draw).to(dtype) for _ in "ab")
    found: list[list[Tensor]] = []
    for transform in (torch.compile, lambda module: module):
        module, leaf = dyt(32, 0.7, gain=1.25, bias=0.5).to(dtype), x.clone().requires_grad_()
        y = transform(module)(leaf)
        y.backward(dy)
        found.append([y, leaf.grad, module.alpha.grad, module.weight.grad, module.bias.grad])
    for compiled, eager in zip(*found, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance * float(eager.abs().max()) / 8)


def test_dyt_is_bounded_by_gain_and_bias() -> None:
    module = dyt(6, 2.0, gain=1.5, bias=0.25)
    assert module(1e30 * torch.randn(20, 6)).abs().max() <= 1.75


def config(width: int = 32, **model: Any) -> ModelConfig:
    return build({**LLAMA, "hidden_size": width, "norm": "dyt", **model}).config


@pytest.mark.parametrize(
    ("width", "attention", "other"),
    [
        *((1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (8192, 0.2, 0.05)),
        *((128, 1.0, 1.0), (16384, 0.2, 0.05)),
        (1448, 1.0, 2 ** -(math.log2(1448) - 10)),  # from 1024 to 2048 log2 alpha falls by one as log2 width rises by one
        (4608, 0.8 * 0.75 ** (math.log(4608 / 4096) / math.log(1.25)), 0.2 * 0.75 ** (math.log(4608 / 4096) / math.log(1.25))),
    ],
)
def test_alpha_starts_at_the_papers_for_the_width(width: int, attention: float, other: float) -> None:
    model = config(width)
    assert dyt_alpha(model, "attention") == pytest.approx(attention, rel=1e-9)
    assert dyt_alpha(model, "other") == pytest.approx(other, rel=1e-9)


def test_alpha_starts_at_the_configs_where_it_says_so() -> None:
    model = config(2048, dyt={"alpha_attention": 0.3})
    assert (dyt_alpha(model, "attention"), dyt_alpha(model, "other")) == (0.3, 0.5)


@pytest.mark.parametrize("base", [LLAMA, GPT], ids=["llama", "gpt"])
def test_every_site_starts_at_its_alpha_and_nothing_of_dyt_decays(base: dict) -> None:
    section = {"alpha_attention": 0.75, "alpha_other": 0.25}
    network = build({**base, "norm": "dyt", "norm_position": "peri", "embedding_norm": True, "dyt": section})
    init_weights(network, network.config, 0)
    values = logical(network)
    alphas = {name: values[name].tolist() for name in values if name.endswith(".alpha")}
    assert len(alphas) == 4 * 2 + 2
    assert alphas == {name: [0.75] if name.endswith("attention_norm.alpha") else [0.25] for name in alphas}
    assert values["embedding_scale"].tolist() == [pytest.approx(math.sqrt(32))]
    assert (values["final_norm"] == 1).all() and not values["final_norm.bias"].any()
    decayed, rest = ({part.name for p in group["params"] for part in info_of(p).parts} for group in decay_groups(network.parameters(), 0.1))
    assert {name for name in values if "norm" in name or "scale" in name} <= rest and not rest & decayed


def plain_norm(kind: str, name: str, values: dict[str, Tensor]) -> Any:
    """The norm called ``name`` in plain torch."""

    def apply(x: Tensor) -> Tensor:
        gain, bias = values[name], values.get(f"{name}.bias")
        if kind == "dyt":
            return formula(x, values[f"{name}.alpha"], gain, bias)
        return F.layer_norm(x, (32,), gain, bias, 1e-5) if kind == "layernorm" else F.rms_norm(x, (32,), gain, 1e-5)

    return apply


def plain_block(x: Tensor, position: str, norm: Any, attention: Any, mlp: Any, scale: float) -> Tensor:
    sites = ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
    a_in, a_out, m_in, m_out = (norm(f"layers.2.{site}") for site in sites)
    if position == "pre":
        x = x + attention(scale * a_in(x))
        return x + mlp(scale * m_in(x))
    if position == "post":
        x = a_out(x + attention(x))
        return m_out(x + mlp(x))
    if position == "peri":
        x = x + a_out(attention(scale * a_in(x)))
        return x + m_out(mlp(scale * m_in(x)))
    x = x + a_out(attention(x))
    return x + m_out(mlp(x))


CASES = [
    *((position, kind, False) for position in ("pre", "post", "peri", "reordered") for kind in ("rmsnorm", "layernorm", "dyt")),
    *((position, kind, True) for position in ("pre", "peri") for kind in ("rmsnorm", "layernorm")),
]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("position", "kind", "is_scaled"), CASES)
def test_a_block_is_its_formula(position: str, kind: str, is_scaled: bool, recompute: str) -> None:
    model = build({**LLAMA, "norm": kind, "norm_position": position, "layer_norm_scaling": is_scaled}).config
    block = Block(model, ALONE, 2, recompute)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for parameter in block.parameters():
        is_vector = parameter.dim() == 1
        nn.init.normal_(parameter, 0.5 if is_vector else 0.0, 0.2 if is_vector else 0.1)
    values = {part.name: p for p in block.parameters() for part in info_of(p).parts if part.role in ("norm", "bias", "scale")}
    context = Context(2, 8)
    x, theirs = (torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in "ab")
    found = block(x, context)
    wanted = plain_block(
        theirs,
        position,
        lambda name: plain_norm(kind, name, values),
        lambda y: block.attention(y, context),
        block.mlp,
        1 / math.sqrt(3) if is_scaled else 1.0,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    mine, other = (torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()]) for out, leaf in ((found, x), (wanted, theirs)))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_there_is_no_norm_a_position_does_not_use() -> None:
    def norms_of(position: str) -> set[str]:
        names = logical(build({**LLAMA, "norm_position": position}))
        return {name.removeprefix("layers.0.") for name in names if "norm" in name and not name.startswith("layers.1.")}

    before, after = {"attention_norm", "mlp_norm"}, {"attention_output_norm", "mlp_output_norm"}
    assert norms_of("pre") == {*before, "final_norm"}
    assert norms_of("peri") == {*before, *after, "final_norm"}
    assert norms_of("reordered") == {*after, "final_norm"}
    assert norms_of("post") == after, "the last block ends with its norm"


def test_build_norm_gives_dyt() -> None:
    assert isinstance(build_norm("n", config(), ALONE), DyT)
