"""A single-process model of ours, and the copy of a Hugging Face model's weights into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megastab.config.load import load_config
from megastab.model.transformer import Transformer
from megastab.parallel.param_info import info_of


def build(model: dict[str, Any], **block: Any) -> Transformer:
    """Our network on one process, weights not yet drawn."""
    config = load_config(
        {
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "megastab": {"model": model, "run": {"total_steps": 1}, **block},
        },
        world_size=1,
    )
    return Transformer(config.megastab).train()


def logical(module: nn.Module, of: str = "data") -> dict[str, Tensor]:
    """Views of every logical matrix (or of its gradient, ``of="grad"``) by canonical name."""
    out: dict[str, Tensor] = {}
    for parameter in module.parameters():
        info = info_of(parameter)
        assert info is not None
        pieces = getattr(parameter, of).split([part.rows for part in info.parts])
        out.update(zip((part.name for part in info.parts), pieces, strict=True))
    return out


def llama_names(layers: int, tied: bool) -> dict[str, tuple[str, bool]]:
    """Our name -> (Hugging Face's, whether it is stored transposed): ours keeps o and down as [in, D]."""
    names = {"embedding": ("model.embed_tokens.weight", False), "final_norm": ("model.norm.weight", False)}
    if not tied:
        names["head"] = ("lm_head.weight", False)
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names |= {f"{ours}.attention.{x}": (f"{theirs}.self_attn.{x}_proj.weight", x == "o") for x in "qkvo"}
        names |= {f"{ours}.mlp.{x}": (f"{theirs}.mlp.{x}_proj.weight", x == "down") for x in ("gate", "up", "down")}
        names[f"{ours}.attention_norm"] = (f"{theirs}.input_layernorm.weight", False)
        names[f"{ours}.mlp_norm"] = (f"{theirs}.post_attention_layernorm.weight", False)
    return names


def gpt2_matrices(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A GPT-2 state (or its gradients) under our names; Conv1D stores [in, out], ours [out, in] but for o and down."""
    out = {"embedding": theirs["transformer.wte.weight"], "positions": theirs["transformer.wpe.weight"]}

    def norm(ours: str, name: str) -> None:
        out[ours], out[f"{ours}.bias"] = theirs[f"{name}.weight"], theirs[f"{name}.bias"]

    norm("final_norm", "transformer.ln_f")
    for i in range(layers):
        h, ours = f"transformer.h.{i}", f"layers.{i}"
        norm(f"{ours}.attention_norm", f"{h}.ln_1")
        norm(f"{ours}.mlp_norm", f"{h}.ln_2")
        weights, biases = theirs[f"{h}.attn.c_attn.weight"].t().chunk(3), theirs[f"{h}.attn.c_attn.bias"].chunk(3)
        for x, weight, bias in zip("qkv", weights, biases, strict=True):
            out[f"{ours}.attention.{x}"], out[f"{ours}.attention.{x}.bias"] = weight, bias
        out[f"{ours}.attention.o"], out[f"{ours}.attention.o.bias"] = theirs[f"{h}.attn.c_proj.weight"], theirs[f"{h}.attn.c_proj.bias"]
        out[f"{ours}.mlp.up"], out[f"{ours}.mlp.up.bias"] = theirs[f"{h}.mlp.c_fc.weight"].t(), theirs[f"{h}.mlp.c_fc.bias"]
        out[f"{ours}.mlp.down"], out[f"{ours}.mlp.down.bias"] = theirs[f"{h}.mlp.c_proj.weight"], theirs[f"{h}.mlp.c_proj.bias"]
    return out


@torch.no_grad()
def copy_into(module: nn.Module, matrices: dict[str, Tensor]) -> None:
    """Fill our model; every matrix of ours must be given. Padding rows of the vocabulary become noise: nothing may depend on them."""
    for name, target in logical(module).items():
        source = matrices[name]
        target[: len(source)].copy_(source)
        target[len(source) :].normal_()
