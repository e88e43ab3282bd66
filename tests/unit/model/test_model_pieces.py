"""Activations, dropout's place in a block, recompute, and the pipeline's payload."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megastab.config.load import load_config
from megastab.model.context import Context
from megastab.model.counts import flops_per_token, num_parameters
from megastab.model.embedding import gathered_logits
from megastab.model.init import init_weights
from megastab.model.kv_cache import KVCache
from megastab.model.mlp import MLP, keep_largest
from megastab.model.norms import LayerNorm, build_norm
from megastab.model.stages import Sides
from megastab.model.transformer import Transformer
from megastab.parallel.grid import ALONE, TensorParallel
from tests.layouts import GPT, LLAMA, NORM_VARIANTS, SINGLE, config_of
from tests.oracle.models import build, logical

VARIANTS = {name: {**LLAMA, **changes} for name, changes in NORM_VARIANTS.items()}


def drawn(model: dict, seed: int = 1, **block: dict) -> Transformer:
    out = build(model, **block)
    init_weights(out, out.config, seed)
    return out


def batch(samples: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 100, (samples, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:], torch.ones(samples, 16), torch.arange(samples)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        ("relu", F.relu),
        ("relu2", lambda x: F.relu(x) ** 2),
        ("topk", lambda x: torch.where(x >= x.topk(16, -1).values[:, -1:], x, 0.0).relu()),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_mlp_is_its_formula(arch: str, activation: str, formula) -> None:
    config = build({**LLAMA, "arch": arch, "activation": activation, "activation_topk": 0.25}).config
    mlp = MLP(config, ALONE, 0)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x, parts = torch.randn(10, 32), logical(mlp)
    hidden = {name.split(".")[-1]: F.linear(x, weight) for name, weight in parts.items() if name.endswith((".gate", ".up"))}
    if arch == "gpt":
        want = formula(hidden["up"] + parts["layers.0.mlp.up.bias"]) @ parts["layers.0.mlp.down"] + parts["layers.0.mlp.down.bias"]
    else:
        want = (formula(hidden["gate"]) * hidden["up"]) @ parts["layers.0.mlp.down"]
    torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-4)


def test_topk_keeps_the_largest_and_no_gradient_elsewhere() -> None:
    x = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -3.0, -2.0, -1.0]], requires_grad=True)
    y = keep_largest(x, 2, ALONE)
    y.sum().backward()
    assert y.tolist() == [[3, 0, 0, 5], [0, 0, 0, 0]] and x.grad.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("model", [LLAMA, {**GPT, "dropout": 0.2}], ids=["llama", "gpt with dropout"])
def test_recompute_changes_no_bit(model: dict, recompute: str) -> None:
    plain, again = drawn(model), drawn(model, parallel={"recompute": recompute})
    for network in (plain, again):
        network(*batch()).backward()
    grads = logical(plain, "grad")
    assert all(torch.equal(value, grads[name]) for name, value in logical(again, "grad").items())


def test_recompute_is_off_in_evaluation() -> None:
    plain, again = drawn(LLAMA).eval(), drawn(LLAMA, parallel={"recompute": "full"}).eval()
    assert torch.equal(plain(*batch()), again(*batch()))


def test_dropout_is_off_in_evaluation_and_follows_the_sample() -> None:
    model, without = drawn({**GPT, "dropout": 0.3}), drawn(GPT)
    tokens, labels, weights, samples = batch()
    assert not torch.equal(model(tokens, labels, weights, samples), without(tokens, labels, weights))
    assert torch.equal(model(tokens, labels, weights, samples), model(tokens, labels, weights, samples)), "replayed exactly"
    assert not torch.equal(model(tokens, labels, weights, samples), model(tokens, labels, weights, samples + 3))
    parts = sum(model(tokens[i : i + 1], labels[i : i + 1], weights[i : i + 1], samples[i : i + 1]) for i in range(3))
    torch.testing.assert_close(parts, model(tokens, labels, weights, samples), rtol=1e-6, atol=0)
    assert torch.equal(model.eval()(tokens, labels, weights, samples), without(tokens, labels, weights))


def test_attention_is_causal() -> None:
    model = drawn(LLAMA).eval()
    tokens, *_ = batch()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 100
    a, b = (model.logits(t).view(3, 16, -1) for t in (tokens, changed))
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9:], b[:, 9:])


def test_padding_columns_are_dropped_from_logits() -> None:
    logits = torch.randn(4, 128).bfloat16()
    kept = gathered_logits(logits, 100)
    assert kept.shape == (4, 100) and kept.dtype == torch.float32 and torch.equal(kept, logits[:, :100].float())


@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        GPT,
        {**LLAMA, "num_kv_heads": 1, "tie_embeddings": True, "norm": "layernorm"},
        {**GPT, "norm": "rmsnorm", "num_kv_heads": 2},
        {**LLAMA, "norm": "rmsnorm_scalar"},
        {**LLAMA, "num_kv_heads": 2, "sink": "kv_bias", "qk_norm": "full", "output_gate": "head"},
        {**GPT, "num_kv_heads": 2, "sink": "learned", "qk_norm": "head", "output_gate": "element"},
        *VARIANTS.values(),
    ],
    ids=[
        "llama",
        "gpt",
        "tied mqa layernorm",
        "gpt rmsnorm gqa",
        "rmsnorm_scalar",
        "kv_bias full head",
        "gpt learned head element",
        *VARIANTS,
    ],
)
def test_parameters_are_counted_without_building(model: dict) -> None:
    network = build(model)
    assert num_parameters(network.config) == sum(p.numel() for p in network.parameters())


def test_flops_are_six_per_matrix_element_and_causal_attention() -> None:
    network = build(LLAMA)
    matrices = sum(v.numel() for name, v in logical(network).items() if v.dim() == 2 and name != "embedding")
    assert flops_per_token(network.config) == 6 * matrices + 2 * 6 * 16 * 32  # 2 layers, S 16, width 32


def test_cache_refuses_what_does_not_fit() -> None:
    cache = KVCache(4)
    keys, values = cache.append(torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))
    assert keys.shape == values.shape == (1, 3, 1, 2) and cache.length == 3
    with pytest.raises(ValueError, match="5 positions do not fit a cache of 4"):
        cache.append(torch.ones(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))


def test_build_norm_gives_the_configs() -> None:
    config = build({**LLAMA, "norm": "layernorm", "norm_eps": 1e-3}).config
    norm = build_norm("n", config, ALONE)
    assert isinstance(norm, LayerNorm) and norm.eps == 1e-3
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = torch.randn(5, 32)
    centred = x - x.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_rmsnorm_has_one_gain_and_its_gradient(dtype: torch.dtype) -> None:
    config = build({**LLAMA, "norm": "rmsnorm_scalar", "norm_eps": 1e-3}).config
    norm = build_norm("n", config, ALONE).to(dtype)
    norm.weight.data.fill_(1.5)
    x, out = torch.randn(5, 32, dtype=dtype, requires_grad=True), torch.randn(5, 32, dtype=dtype)
    gain, y = torch.tensor([1.5], dtype=torch.float64, requires_grad=True), x.detach().double().requires_grad_()
    want = y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    found = norm(x)
    found.backward(out)
    want.backward(out.double())
    assert norm.weight.shape == (1,) and found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, exact in ((found, want), (x.grad, y.grad), (norm.weight.grad, gain.grad)):
        torch.testing.assert_close(mine.double(), exact, **tolerance)


@pytest.mark.parametrize(("dropout", "documents", "length"), [(0.0, False, 1), (0.1, False, 2), (0.0, True, 2), (0.1, True, 3)])
def test_payload_carries_what_the_run_needs_and_no_more(dropout: float, documents: bool, length: int) -> None:
    config = load_config(config_of(SINGLE, model={**GPT, "dropout": dropout}, data={"document_mask": documents}), world_size=1)
    sides = Sides(config.megastab, ALONE, ALONE)
    x, samples, ids = torch.zeros(2, 3), torch.tensor([4, 5]), torch.zeros(2, 16, dtype=torch.int32)
    payload = sides.pack(x, samples, ids)
    assert (len(payload) if isinstance(payload, tuple) else 1) == length and (length > 1 or payload is x)
    first, rest, found_samples, found_ids = sides.unpack(payload)
    assert first is x and len(rest) == length - 1
    assert found_samples is (samples if dropout else None) and found_ids is (ids if documents else None)


def test_a_rank_knows_its_tokens() -> None:
    context = Context(2, 8)
    device = torch.device("cpu")
    assert context.local_tokens(ALONE, device).tolist() == list(range(16))
    assert context.local_tokens(TensorParallel(1, 4, None, True), device).tolist() == [4, 5, 6, 7]
