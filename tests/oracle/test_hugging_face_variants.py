"""Whole models whose norms, caps and query-key norms differ from LLaMA's equal transformers', in fp32: OLMo 2 and Gemma 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Olmo2Config, Olmo2ForCausalLM

from tests.oracle.models import build, matrices_in, names_in
from tests.oracle.test_hugging_face import LAYERS, SEQ, VOCAB, compare

HIDDEN, HEADS, KV_HEADS, FFN = 48, 6, 2, 80
# Spread out, so that gains matter and the caps bend what they cap.
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
OURS: dict[str, Any] = {
    "arch": "llama",
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "ffn_hidden_size": FFN,
    "max_seq_len": SEQ,
    "vocab_size": VOCAB,
}


def spread_gains(model: torch.nn.Module, mean: float) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(mean, 0.2)


def translator(names: dict[str, tuple[str, bool]]):
    """From their matrices to ours; ``o`` and ``down`` are stored turned."""
    return lambda by_name: {mine: by_name[n].t() if turned else by_name[n] for mine, (n, turned) in names.items()}


def test_olmo2_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs = Olmo2ForCausalLM(Olmo2Config(**THEIRS, tie_word_embeddings=False))
    spread_gains(theirs, 1.0)
    ours = build({**OURS, "norm_position": "reordered", "qk_norm": "full"})
    compare(ours, theirs, lambda by_name: matrices_in(by_name, ours.config, "olmo2"))


@pytest.mark.parametrize("caps", [(2.0, 3.0), (None, None)], ids=["capped", "not capped"])
def test_gemma2_equals_transformers(caps: tuple[float | None, float | None]) -> None:
    torch.manual_seed(1)
    attention_cap, logit_cap = caps
    # No sliding window within the sequence, and the head width Gemma divides by is ours.
    config = Gemma2Config(
        **THEIRS, head_dim=HIDDEN // HEADS, query_pre_attn_scalar=HIDDEN // HEADS, sliding_window=SEQ,
        attn_logit_softcapping=attention_cap, final_logit_softcapping=logit_cap,
    )  # fmt: skip
    theirs = Gemma2ForCausalLM(config)
    spread_gains(theirs, 0.0)
    gemma = {"norm_position": "peri", "activation": "gelu", "tie_embeddings": True, "embedding_multiplier": HIDDEN**0.5}
    ours = build({**OURS, **gemma, "attention_softcap": attention_cap, "logit_softcap": logit_cap})
    names = names_in(ours.config, "llama")
    for i in range(LAYERS):
        mine, layer = f"layers.{i}", f"model.layers.{i}"
        names[f"{mine}.attention_output_norm"] = (f"{layer}.post_attention_layernorm.weight", False)
        names[f"{mine}.mlp_norm"] = (f"{layer}.pre_feedforward_layernorm.weight", False)
        names[f"{mine}.mlp_output_norm"] = (f"{layer}.post_feedforward_layernorm.weight", False)
    plain = translator(names)

    def translate(by_name: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gemma's gain is 1 + weight; a gradient is the same for both."""
        is_data = by_name["model.norm.weight"].data_ptr() == theirs.model.norm.weight.data_ptr()
        return {name: m + 1 if is_data and name.endswith("norm") else m for name, m in plain(by_name).items()}

    compare(ours, theirs, translate)
