"""Attention variants equal transformers': Qwen3's query and key norms in a whole model, gpt-oss's learned sinks in its attention.

1e-4 absolute, as in ``test_hugging_face.py``; 1e-5 for one layer, whose numbers are of order 1.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from megastab.model.context import Context
from tests.oracle.models import build, logical, matrices_in
from tests.oracle.test_hugging_face import LAYERS, SEQ, VOCAB, compare

HIDDEN, HEADS = 48, 6


def ours(kv_heads: int, **model: object):
    return build(
        {
            "arch": "llama",
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "num_kv_heads": kv_heads,
            "ffn_hidden_size": 80,
            "max_seq_len": SEQ,
            "vocab_size": VOCAB,
            "rope_theta": 5000.0,
            **model,
        }  # fmt: skip
    )


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_qk_norm_equals_qwen3(kv_heads: int) -> None:
    torch.manual_seed(kv_heads)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=80,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            head_dim=HIDDEN // HEADS,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=5000.0,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )  # fmt: skip
    )
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
    model = ours(kv_heads, qk_norm="head")
    compare(model, theirs, lambda by_name: matrices_in(by_name, model.config, "qwen3"))


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_learned_sinks_equal_gpt_oss(kv_heads: int) -> None:
    """Its attention alone, output and gradients: the whole model is a mixture of experts."""
    torch.manual_seed(kv_heads)
    config = GptOssConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HIDDEN // HEADS,
        attention_bias=False,
        layer_types=["full_attention"],
        num_hidden_layers=1,
    )
    config._attn_implementation = "eager"
    theirs = GptOssAttention(config, 0)
    for parameter in theirs.parameters():
        parameter.data.normal_(0.0, 0.3)
    theirs.sinks.data.normal_(0.0, 2.0)
    mine = ours(kv_heads, sink="learned").blocks[0].attention
    parts = {name.removeprefix("layers.0.attention."): part for name, part in logical(mine).items()}
    pairs = {"sink": theirs.sinks} | {x: getattr(theirs, f"{x}_proj").weight for x in "qkvo"}
    for name, weight in pairs.items():
        parts[name].copy_(weight.detach().t() if name == "o" else weight.detach())

    x = torch.randn(2, SEQ, HIDDEN)
    angles = torch.outer(torch.arange(SEQ, dtype=torch.float64), 5000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    positions = tuple(t.float()[None] for t in (angles.cos(), angles.sin()))
    unseen = torch.full((SEQ, SEQ), -torch.inf).triu(1)[None, None]
    want = theirs(x, positions, unseen)[0]
    found = mine(x.reshape(-1, HIDDEN), Context(2, SEQ)).view_as(want)
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    upstream = torch.randn_like(want)
    want.backward(upstream)
    found.backward(upstream)
    gradients = {name.removeprefix("layers.0.attention."): g for name, g in logical(mine, "grad").items()}
    for name, weight in pairs.items():
        assert weight.grad is not None and weight.grad.abs().max() > 0.1
        expected = weight.grad.t() if name == "o" else weight.grad
        assert (gradients[name] - expected).abs().max() < 1e-5 * expected.abs().max(), name
