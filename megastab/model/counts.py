"""How many parameters and FLOPs a model has, from its config alone."""

from __future__ import annotations

from typing import Literal

from megastab.config.schema import ModelConfig
from megastab.config.vocab import padded_vocab


def block_matrices(model: ModelConfig) -> int:
    """Elements of one block's matrices."""
    kv = model.num_kv_heads * model.head_dim
    mlp = 3 if model.arch == "llama" else 2
    return model.hidden_size * (2 * model.hidden_size + 2 * kv + gate_rows(model) + mlp * model.ffn_hidden_size)


def gate_rows(model: ModelConfig) -> int:
    """Gates of a token on attention's output."""
    return {"none": 0, "head": model.num_heads, "element": model.hidden_size}[model.output_gate]


def attention_vectors(model: ModelConfig) -> int:
    """Elements of one block's query and key norms and of its sink."""
    kv = model.num_kv_heads * model.head_dim
    norms = {"none": 0, "head": 2 * model.head_dim, "full": model.hidden_size + kv}[model.qk_norm]
    return norms + {"none": 0, "softmax1": 0, "learned": model.num_heads, "kv_bias": 2 * kv}[model.sink]


def norm_vectors(model: ModelConfig) -> int:
    """Elements of one norm's gain and bias, and DyT's alpha."""
    width = model.hidden_size
    return {"layernorm": 2 * width, "rmsnorm": width, "rmsnorm_scalar": 1, "dyt": 2 * width + 1}[model.norm]


def norms_of_a_branch(model: ModelConfig) -> int:
    """Norms around attention, and around the MLP."""
    return 2 if model.norm_position == "peri" else 1


def has_final_norm(model: ModelConfig) -> bool:
    """Whether a norm precedes the head: under ``post`` the last block ends with it."""
    return model.norm_position != "post"


def learns_embedding_scale(model: ModelConfig) -> bool:
    """Whether the embedding's output has a learned factor."""
    return model.norm == "dyt" and model.dyt.embedding_scale


def entrance(model: ModelConfig) -> list[Literal["scale", "positions", "norm"]]:
    """The layers between the look-up and the blocks; the look-up's own may be tied, and holds nothing but its matrix."""
    has_scale = learns_embedding_scale(model) or model.embedding_multiplier != 1.0
    layers: list[Literal["scale", "positions", "norm"]] = ["scale"] if has_scale else []
    if model.arch == "gpt":
        return [*layers, "positions"]  # its norm lies between the sum and the dropout, inside
    return [*layers, "norm"] if model.embedding_norm else layers


def block_vectors(model: ModelConfig) -> int:
    """Elements of one block's gains and biases."""
    gains = 2 * norms_of_a_branch(model) * norm_vectors(model) + attention_vectors(model)
    if model.arch == "llama":
        return gains
    kv = model.num_kv_heads * model.head_dim
    # biases of q, o and down; k and v; the gate; up
    return gains + 3 * model.hidden_size + 2 * kv + gate_rows(model) + model.ffn_hidden_size


def num_parameters(model: ModelConfig) -> int:
    """All of them, vocabulary padding included, a tied matrix once."""
    assert model.vocab_size is not None
    embeddings = padded_vocab(model.vocab_size) * model.hidden_size * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len * model.hidden_size if model.arch == "gpt" else 0
    scale, norms = int(learns_embedding_scale(model)), int(model.embedding_norm) + int(has_final_norm(model))
    outside = embeddings + positions + scale + norms * norm_vectors(model)
    return outside + model.num_layers * (block_matrices(model) + block_vectors(model))


def layer_costs(model: ModelConfig) -> list[int]:
    """Cost of each pipeline layer: embedding, its :func:`entrance`, the blocks, final norm (but for post), head.

    Cost is the layer's matrix elements, which is also its matrix FLOPs per token; a look-up costs nothing.
    """
    assert model.vocab_size is not None
    before, after = [0] * (1 + len(entrance(model))), [0] * has_final_norm(model)
    return [*before, *[block_matrices(model)] * model.num_layers, *after, padded_vocab(model.vocab_size) * model.hidden_size]


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs the model needs per token: 6 per matrix element (head included, look-up free) and causal attention.

    Attention of a token sees S/2 others on average: 2 products x 2 FLOPs x S/2 x width forward, twice that backward.
    Recompute is not counted (PaLM, appendix B, there without the causal half).
    """
    assert model.vocab_size is not None
    matrices = model.num_layers * block_matrices(model) + padded_vocab(model.vocab_size) * model.hidden_size
    return 6.0 * matrices + 6.0 * model.num_layers * model.max_seq_len * model.hidden_size
