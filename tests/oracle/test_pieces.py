"""Each piece equals its public reference: torch, transformers or megatron-core."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megastab.config.schema import RopeScalingConfig
from megastab.model.attention import attend
from megastab.model.kv_cache import KVCache
from megastab.model.loss import cross_entropy
from megastab.model.norms import RMSNorm
from megastab.model.rope import rope_table, rotate, scaled_frequencies
from megastab.parallel.grid import ALONE
from tests.oracle.models import build
from tests.ranks import run_ranks

TOKENS, VOCAB, PADDED = 50, 90, 128


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def problem(scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weights = torch.rand(TOKENS)
    weights[::7] = 0.0
    return torch.randn(TOKENS, PADDED) * scale, torch.randint(0, VOCAB, (TOKENS,)), weights


def test_loss_equals_torch() -> None:
    logits, labels, weights = problem()
    mine, theirs = leaf(logits), leaf(logits)
    loss = cross_entropy(mine, labels, weights, VOCAB)
    expected = (F.cross_entropy(theirs[:, :VOCAB], labels, reduction="none") * weights).sum()
    (2.5 * loss).backward()
    (2.5 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)
    assert not mine.grad[:, VOCAB:].any(), "padding columns have no gradient"


def test_loss_survives_large_logits() -> None:
    logits, labels, weights = problem(scale=1e4)
    loss = cross_entropy(leaf(logits), labels, weights, VOCAB)
    expected = (F.cross_entropy(logits[:, :VOCAB].double(), labels, reduction="none") * weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, weights = problem()
    whole, cut = leaf(logits), leaf(logits)
    one = cross_entropy(whole, labels, weights, VOCAB, 1e-2)
    one.backward()
    monkeypatch.setattr("megastab.model.loss.CHUNK_ELEMENTS", {"cpu": 7 * PADDED})
    many = cross_entropy(cut, labels, weights, VOCAB, 1e-2)
    many.backward()
    assert torch.equal(one, many) and torch.equal(whole.grad, cut.grad)


def test_z_loss_equals_autograd_of_its_definition() -> None:
    logits, labels, weights = problem()
    mine, theirs = leaf(logits), leaf(logits.double())
    loss = cross_entropy(mine, labels, weights, VOCAB, z_loss=0.03)
    lse = theirs[:, :VOCAB].logsumexp(-1)
    expected = (weights * (lse - theirs.gather(1, labels[:, None])[:, 0] + 0.03 * lse.square())).sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=1e-6)


def against_megatron() -> tuple[float, float, float]:
    """On a rank of two: largest deviation of losses and gradients from megatron-core's, which has no padding and no weights."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megastab.parallel.grid import Grid

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    grid = Grid.create(tensor=2)
    logits, labels, _ = problem()
    half = slice(grid.tp.rank * PADDED // 2, (grid.tp.rank + 1) * PADDED // 2)
    mine, theirs = leaf(logits[:, half]), leaf(logits[:, half])
    loss = cross_entropy(mine, labels, torch.ones(TOKENS), PADDED, 0.0, grid.tp)
    expected = vocab_parallel_cross_entropy(theirs.clone()[:, None], labels[:, None]).sum()
    loss.backward()
    expected.backward()
    single = leaf(logits)
    cross_entropy(single, labels, torch.ones(TOKENS), PADDED).backward()
    return (
        float((loss - expected).detach().abs() / expected.detach()),
        float((mine.grad - theirs.grad).abs().max()),
        float((mine.grad - single.grad[:, half]).abs().max()),
    )


def test_loss_equals_megatron_core_over_two_ranks() -> None:
    for loss, gradient, single in run_ranks(2, against_megatron):
        assert loss < 1e-6 and gradient < 1e-6 and single < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm_equals_torch_in_fp64(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """bf16: the reference is fp64 on the same rounded inputs, so that 1e-2 is one rounding (4e-3) of results up to ~3."""
    torch.manual_seed(1)
    norm = RMSNorm("norm", 160, 1e-5, ALONE, None)
    norm.weight.data.normal_(1.0, 0.3)
    norm.to(dtype)
    x, dy = (torch.randn(40, 160) * scale).to(dtype), torch.randn(40, 160).to(dtype)
    mine, theirs, gain = leaf(x), leaf(x.double()), leaf(norm.weight.double())
    y = norm(mine)
    expected = F.rms_norm(theirs, (160,), gain, 1e-5)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == dtype and mine.grad.dtype == dtype and norm.weight.grad.dtype == dtype
    for found, wanted in ((y, expected), (mine.grad, theirs.grad), (norm.weight.grad, gain.grad)):
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("head_dim", [8, 64])
def test_rope_equals_transformers(head_dim: int) -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, 40, 4, head_dim), torch.randn(2, 40, 2, head_dim)
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=10000.0, max_position_embeddings=64)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(40)[None])
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    table = rope_table(40, head_dim, 10000.0, q.device)
    for x, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, table).transpose(1, 2), wanted, rtol=0, atol=2e-5)  # HF's angles are fp32
        mine, theirs = leaf(x), leaf(x)
        rotate(mine, table).square().sum().backward()
        theirs.square().sum().backward()  # a rotation keeps lengths
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)
    later = rope_table(10, head_dim, 10000.0, q.device, first=30)
    assert torch.equal(rotate(q[:, 30:], later), rotate(q, table)[:, 30:])


@pytest.mark.parametrize(("theta", "length", "factor"), [(500000.0, 8192, 8.0), (500000.0, 8192, 32.0), (10000.0, 64, 4.0)])
def test_llama3_frequencies_equal_transformers(theta: float, length: int, factor: float) -> None:
    """Llama 3.1's and 3.2's constants, and a small one. 1e-5 relative: theirs are powers taken in fp32."""
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": length, **scaling}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=16 * length, rope_parameters=rope)
    expected = LlamaRotaryEmbedding(config).inv_freq.double()
    plain = theta ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    found = scaled_frequencies(plain, RopeScalingConfig(original_max_seq_len=length, **scaling))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    ratio = plain / found
    assert ratio[0] == 1.0 and abs(ratio[-1] - factor) < 1e-9 and ((ratio > 1.01) & (ratio < factor - 0.01)).any(), "all three kinds"


def dense_attention(q: Tensor, k: Tensor, v: Tensor, may_see: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v in fp64 where ``may_see`` [B, S, L] says; heads repeated for groups."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~may_see[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("has_documents", [False, True])
def test_attention_equals_its_definition(kv_heads: int, has_documents: bool) -> None:
    torch.manual_seed(3)
    seq = 19
    q, k, v = torch.randn(2, seq, 4, 8), torch.randn(2, seq, kv_heads, 8), torch.randn(2, seq, kv_heads, 8)
    documents = (torch.rand(2, seq) < 0.2).cumsum(1).int() if has_documents else torch.zeros(2, seq, dtype=torch.int32)
    may_see = torch.ones(seq, seq, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None, :])
    mine, theirs = [leaf(x) for x in (q, k, v)], [leaf(x) for x in (q, k, v)]
    out = attend(*mine, documents if has_documents else None)
    expected = dense_attention(*theirs, may_see)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-5)


LLAMA = {
    "arch": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 20, "vocab_size": 60,
    "init": {"std": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gpt"])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 5, 7], [20]], ids=["token by token", "pieces", "whole"])
@torch.no_grad()
def test_cached_logits_equal_whole_sequence(arch: str, pieces: list[int]) -> None:
    from megastab.model.context import Context
    from megastab.model.init import init_weights

    model = build({**LLAMA, "arch": arch}).eval()
    init_weights(model, model.config, 7)
    tokens = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(4))
    whole = model.logits(tokens).view(3, 20, -1)
    caches, first, out = [KVCache(20) for _ in range(2)], 0, []
    for length in pieces:
        here = tokens[:, first : first + length]
        out.append(model.logits(here, Context(3, length, first_position=first), caches).view(3, length, -1))
        first += length
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=1e-5)


def test_documents_do_not_see_each_other_in_the_model() -> None:
    """A sample of two documents gives each the logits it has alone (LLaMA: positions are relative)."""
    from megastab.model.context import Context
    from megastab.model.init import init_weights

    model = build(LLAMA).eval()
    init_weights(model, model.config, 7)
    tokens = torch.randint(0, 60, (1, 20), generator=torch.Generator().manual_seed(5))
    documents = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    together = model.logits(tokens, Context(1, 20, document_ids=documents))
    alone = torch.cat([model.logits(tokens[:, :8], Context(1, 8)), model.logits(tokens[:, 8:], Context(1, 12))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def norm_and_clip() -> list[tuple[float, float, float]]:
    """On one rank: the norm each wrapper reports, torch's, and the deviation of the clipped gradient from torch's."""
    from tests import jobs
    from tests.layouts import SINGLE, Layout, config_of

    out = []
    for layout in (SINGLE, Layout(1, zero=1), Layout(1, zero=2), Layout(1, zero=3)):
        job = jobs.start(config_of(layout, "SGD", ds__gradient_clipping=0.2))
        tap = jobs.GradientTap(job)
        job.step()
        clipped = jobs.merge([tap.pieces()])[0]
        bare = build(job.config.megastab.model.model_dump(mode="json"))
        from megastab.model.init import init_weights

        init_weights(bare, job.config.megastab.model, job.config.megastab.run.seed)
        job.batches.consumed = 0
        (batch,) = job.batches.next_step()
        bare(batch.tokens, batch.labels, batch.weights / batch.weights.sum()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.2))
        from tests.oracle.models import logical

        worst = max(float((torch.from_numpy(clipped[n]) - g.reshape(-1)).abs().max()) for n, g in logical(bare, "grad").items())
        out.append((job.norm, norm, worst))
        job.built.engine.destroy()
    return out


def test_norm_and_clip_equal_torch() -> None:
    for mine, theirs, worst in run_ranks(1, norm_and_clip)[0]:
        assert mine == pytest.approx(theirs, rel=1e-6) and theirs > 0.4, "the clip binds"
        assert worst < 1e-7, "gradients here are at most 0.1"
