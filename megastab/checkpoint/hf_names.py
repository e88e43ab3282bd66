"""Where every matrix of ours lies in a Hugging Face model: name, orientation and place, by its ``model_type``.

==========================  =================================================  ===========================================
ours (a range of rows)      LLaMA, Mistral, Qwen3, OLMo 2                      GPT-2
==========================  =================================================  ===========================================
embedding [V, D]            model.embed_tokens.weight                          transformer.wte.weight
positions [S, D]                                                               transformer.wpe.weight
L.attention.q, k, v         model.layers.L.self_attn.{q,k,v}_proj.weight       transformer.h.L.attn.c_attn.weight, turned,
  [out, D]                                                                     q, k and v side by side
L.attention.o [in, D]       ... self_attn.o_proj.weight, turned                ... attn.c_proj.weight
L.mlp.gate, up [F, D]       ... mlp.{gate,up}_proj.weight                      ... mlp.c_fc.weight, turned (up alone)
L.mlp.down [F, D]           ... mlp.down_proj.weight, turned                   ... mlp.c_proj.weight
L.attention_norm, mlp_norm  ... input_layernorm, post_attention_layernorm      ... ln_1, ln_2
L.*_output_norm (OLMo 2)    ... post_attention_layernorm,
                            post_feedforward_layernorm
L.attention.{q,k}_norm      ... self_attn.{q,k}_norm (Qwen3, OLMo 2)
final_norm, head            model.norm, lm_head.weight                         transformer.ln_f, lm_head.weight
==========================  =================================================  ===========================================

Ours stores the residual dimension last, ``nn.Linear`` [out, in], GPT-2's ``Conv1D`` [in, out]: "turned" is the transpose. A bias is
NAME.bias on both sides. Rotary channels pair i with i + H/2 on both sides, so that no row changes its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megastab.config.schema import ModelConfig

PREFIXES = {"llama": "model.", "mistral": "model.", "qwen3": "model.", "olmo2": "model.", "gpt2": "transformer."}
"""What a ``model_type``'s names begin with; files of the bare model, without its head, leave it out."""
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))$")
"""Tables older versions of transformers stored among the weights."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Home:
    """Rows [first, first + rows) of a Hugging Face tensor, once it is turned to our orientation."""

    tensor: str
    rows: int
    width: int | None = None
    """Length of a row; None for vectors."""
    is_turned: bool = False
    first: int = 0


def homes_of(model: ModelConfig, kind: str) -> dict[str, Home]:
    """Canonical name -> its home in a model of ``model_type`` ``kind``, for all matrices of ``model``; vocabulary padding excluded."""
    assert model.vocab_size is not None
    return dict(_gpt2(model) if kind == "gpt2" else _llama(model, kind))


def shape_of(homes: list[Home]) -> tuple[int, ...]:
    """Shape of the one tensor that ``homes`` fill together."""
    rows, width = sum(home.rows for home in homes), homes[0].width
    if width is None:
        return (rows,)
    return (width, rows) if homes[0].is_turned else (rows, width)


def tenants_of(homes: dict[str, Home]) -> dict[str, list[str]]:
    """Hugging Face name -> the canonical matrices it holds, in their order there."""
    tenants: dict[str, list[str]] = {}
    for name, home in homes.items():
        tenants.setdefault(home.tensor, []).append(name)
    return {tensor: sorted(names, key=lambda name: homes[name].first) for tensor, names in tenants.items()}


def _llama(model: ModelConfig, kind: str) -> Iterator[tuple[str, Home]]:
    width, vocab, kv = model.hidden_size, model.vocab_size or 0, model.num_kv_heads * model.head_dim
    yield "embedding", Home("model.embed_tokens.weight", vocab, width)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for x, rows in {"q": width, "k": kv, "v": kv, "o": width}.items():
            yield f"{ours}.attention.{x}", Home(f"{theirs}.self_attn.{x}_proj.weight", rows, width, is_turned=x == "o")
        for x in ("gate", "up", "down"):
            yield f"{ours}.mlp.{x}", Home(f"{theirs}.mlp.{x}_proj.weight", model.ffn_hidden_size, width, is_turned=x == "down")
        for norm, name in _LLAMA_NORMS["olmo2" if kind == "olmo2" else "llama"].items():
            yield f"{ours}.{norm}", Home(f"{theirs}.{name}.weight", width)
        if kind in ("qwen3", "olmo2"):
            lengths = (model.head_dim, model.head_dim) if kind == "qwen3" else (width, kv)
            for x, rows in zip("qk", lengths, strict=True):
                yield f"{ours}.attention.{x}_norm", Home(f"{theirs}.self_attn.{x}_norm.weight", rows)
    yield "final_norm", Home("model.norm.weight", width)
    if not model.tie_embeddings:
        yield "head", Home(HEAD, vocab, width)


_LLAMA_NORMS = {
    "llama": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "olmo2": {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"},
}


def _gpt2(model: ModelConfig) -> Iterator[tuple[str, Home]]:
    width, vocab, channels = model.hidden_size, model.vocab_size or 0, model.ffn_hidden_size
    yield "embedding", Home("transformer.wte.weight", vocab, width)
    yield "positions", Home("transformer.wpe.weight", model.max_seq_len, width)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        yield from _gpt2_norm(f"{ours}.attention_norm", f"{theirs}.ln_1", width)
        for place, x in enumerate("qkv"):
            yield f"{ours}.attention.{x}", Home(f"{theirs}.attn.c_attn.weight", width, width, is_turned=True, first=place * width)
            yield f"{ours}.attention.{x}.bias", Home(f"{theirs}.attn.c_attn.bias", width, first=place * width)
        yield f"{ours}.attention.o", Home(f"{theirs}.attn.c_proj.weight", width, width)
        yield f"{ours}.attention.o.bias", Home(f"{theirs}.attn.c_proj.bias", width)
        yield from _gpt2_norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", width)
        yield f"{ours}.mlp.up", Home(f"{theirs}.mlp.c_fc.weight", channels, width, is_turned=True)
        yield f"{ours}.mlp.up.bias", Home(f"{theirs}.mlp.c_fc.bias", channels)
        yield f"{ours}.mlp.down", Home(f"{theirs}.mlp.c_proj.weight", channels, width)
        yield f"{ours}.mlp.down.bias", Home(f"{theirs}.mlp.c_proj.bias", width)
    yield from _gpt2_norm("final_norm", "transformer.ln_f", width)
    if not model.tie_embeddings:
        yield "head", Home(HEAD, vocab, width)


def _gpt2_norm(ours: str, theirs: str, width: int) -> Iterator[tuple[str, Home]]:
    yield ours, Home(f"{theirs}.weight", width)
    yield f"{ours}.bias", Home(f"{theirs}.bias", width)
