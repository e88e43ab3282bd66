"""Logits and gradients equal transformers' LLaMA and GPT-2 with the same random weights, in fp32.

1e-4 absolute: logits here are of order 1 to 10 and fp32 sums of a few hundred terms in another order differ by some 1e-6 of that.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.oracle.models import build, copy_into, logical, matrices_in

TOLERANCE = 1e-4
SEQ, VOCAB, LAYERS = 24, 150, 3


def compare(ours, theirs, translate) -> None:
    """Same tokens through both; ``translate`` maps their matrices to our names."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (3, SEQ + 1), generator=generator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    their_logits = theirs(inputs).logits
    copy_into(ours, translate({name: p.data for name, p in theirs.named_parameters()}))
    our_logits = ours.logits(inputs).view(3, SEQ, -1)[..., :VOCAB]
    assert (our_logits - their_logits).abs().max() < TOLERANCE
    loss = ours(inputs, labels, torch.full((3, SEQ), 1 / (3 * SEQ)))
    their_loss = F.cross_entropy(their_logits.reshape(-1, VOCAB), labels.reshape(-1))
    assert abs(loss - their_loss) < 1e-5
    loss.backward()
    their_loss.backward()
    expected = translate({name: p.grad for name, p in theirs.named_parameters()})
    found = logical(ours, "grad")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or name.endswith("k.bias"), f"{name}: nothing is tested"
        assert (found[name][: len(gradient)] - gradient).abs().max() < TOLERANCE, name
        assert not found[name][len(gradient) :].any(), f"{name}: a padding row has a gradient"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "ffn"), [(48, 6, 2, 80), (64, 4, 4, 176), (32, 8, 1, 48)])
def test_llama_equals_transformers(hidden: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> None:
    torch.manual_seed(hidden)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=5000.0,
            tie_word_embeddings=tied,
            initializer_range=0.1,
        )  # fmt: skip
    )
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
    ours = build(
        {
            "arch": "llama",
            "num_layers": LAYERS,
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "ffn_hidden_size": ffn,
            "max_seq_len": SEQ,
            "vocab_size": VOCAB,
            "tie_embeddings": tied,
            "rope_theta": 5000.0,
        }  # fmt: skip
    )
    compare(ours, theirs, lambda by_name: matrices_in(by_name, ours.config, "llama"))


@pytest.mark.parametrize(("hidden", "heads"), [(48, 6), (64, 2)])
def test_gpt2_equals_transformers(hidden: int, heads: int) -> None:
    torch.manual_seed(hidden)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=hidden, n_layer=LAYERS, n_head=heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        initializer_range=0.1,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    ours = build({"arch": "gpt", "num_layers": LAYERS, "hidden_size": hidden, "num_heads": heads, "max_seq_len": 64, "vocab_size": VOCAB})
    compare(ours, theirs, lambda by_name: matrices_in(by_name, ours.config, "gpt2"))
