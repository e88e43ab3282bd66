"""Tiny Hugging Face models with random weights, gains and biases included, saved as a user would have them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, SEQ = 100, 48
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": SEQ, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
}  # fmt: skip
# Llama 3's own constants over a first context of 32: of four frequencies one is kept, one between, two are divided.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {**_SIZES, "tie_word_embeddings": True}),
    "llama 3": ("Llama", {**_SIZES, "tie_word_embeddings": False, "rope_theta": 500.0, "rope_scaling": LLAMA3}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": SEQ, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": None}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 8, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {**_SIZES, "eos_token_id": 1}),
}  # fmt: skip


def a_model(name: str, **changes: Any) -> nn.Module:
    """One of ``MODELS``, in evaluation mode."""
    kind, values = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**values, **changes}))  # it writes into what it is handed
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains of 1 and biases of 0 would hide a mistake
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save(model: nn.Module, folder: Path, **how: Any) -> Path:
    """As ``save_pretrained`` does; returns the folder."""
    model.save_pretrained(folder, **how)
    return folder
