"""Every parameter tensor of a stage as one tensor-parallel rank holds it, from the config alone.

A test compares these with the parameters real engines build.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megastab.config.layout import Layout
from megastab.config.schema import ModelConfig
from megastab.config.vocab import padded_vocab
from megastab.model.counts import entrance, gate_rows, has_final_norm, layer_costs, learns_embedding_scale
from megastab.parallel.partition import stage_bounds


@dataclass(frozen=True)
class Weight:
    """One parameter on one rank."""

    name: str
    elements: int
    decays: bool = True
    """Matrices and embeddings do; gains and biases do not."""


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage's ranks hold."""

    index: int
    first: int
    """First layer in pipeline order."""
    stop: int
    weights: tuple[Weight, ...]
    num_blocks: int
    has_embedding: bool
    has_head: bool

    @property
    def elements(self) -> int:
        """Parameters on one rank of the stage."""
        return sum(weight.elements for weight in self.weights)


def stages(model: ModelConfig, layout: Layout) -> list[Stage]:
    """The stages, cut where the engine cuts them."""
    layers = list(_layers(model, layout.tensor))
    bounds = stage_bounds(layer_costs(model), layout.pipeline)
    return [_stage(layers, index, bounds[index], bounds[index + 1]) for index in range(layout.pipeline)]


def _stage(layers: list[list[Weight]], index: int, first: int, stop: int) -> Stage:
    # A tied matrix is one parameter where both ends share a stage, and a copy on each where they do not.
    weights = tuple({weight.name: weight for layer in layers[first:stop] for weight in layer}.values())
    blocks = {weight.name.split(".")[1] for weight in weights if weight.name.startswith("layers.")}
    return Stage(index, first, stop, weights, len(blocks), has_embedding=first == 0, has_head=stop == len(layers))


def decay_groups(weights: Iterable[Weight], weight_decay: float) -> list[list[Weight]]:
    """The optimizer's groups, as ``optim.groups`` makes them: decayed and not, or one where nothing decays."""
    held = list(weights)
    if weight_decay == 0.0:
        return [held]
    groups = [[w for w in held if w.decays], [w for w in held if not w.decays]]
    return [group for group in groups if group]


def _layers(model: ModelConfig, tensor: int) -> Iterator[list[Weight]]:
    width = model.hidden_size
    assert model.vocab_size is not None
    vocab = padded_vocab(model.vocab_size) // tensor * width
    yield [Weight("embedding", vocab)]
    for layer in entrance(model):
        yield [*_entrance(model, layer)]
    for index in range(model.num_layers):
        yield [*_block(model, tensor, f"layers.{index}")]
    if has_final_norm(model):
        yield [*_norm(model, "final_norm")]
    yield [Weight("embedding" if model.tie_embeddings else "head", vocab)]


def _entrance(model: ModelConfig, layer: str) -> Iterator[Weight]:
    if layer == "scale" and learns_embedding_scale(model):
        yield Weight("embedding_scale", 1, decays=False)
    if layer == "positions":
        yield Weight("positions", model.max_seq_len * model.hidden_size)
    if layer != "scale" and model.embedding_norm:
        yield from _norm(model, "embedding_norm")


def _norm(model: ModelConfig, name: str) -> Iterator[Weight]:
    if model.norm == "dyt":
        yield Weight(f"{name}.alpha", 1, decays=False)
    yield Weight(f"{name}.gain", 1 if model.norm == "rmsnorm_scalar" else model.hidden_size, decays=False)
    if model.norm in ("layernorm", "dyt"):
        yield Weight(f"{name}.bias", model.hidden_size, decays=False)


def _block(model: ModelConfig, tensor: int, name: str) -> Iterator[Weight]:
    width, has_bias = model.hidden_size, model.arch == "gpt"
    q, kv, mlp, gates = width // tensor, kv_width(model, tensor), model.ffn_hidden_size // tensor, gate_rows(model) // tensor
    # q, k and v are one parameter unless tensor-parallel ranks share a KV head; an output gate is part of q's.
    projections = {"qkv": q + 2 * kv + gates} if model.num_kv_heads >= tensor else {"q": q + gates, "kv": 2 * kv}
    up = 2 * mlp if model.arch == "llama" else mlp
    before, after = model.norm_position in ("pre", "peri"), model.norm_position != "pre"
    for norm in [*["attention_norm", "mlp_norm"] * before, *["attention_output_norm", "mlp_output_norm"] * after]:
        yield from _norm(model, f"{name}.{norm}")
    for matrix, rows in (*projections.items(), ("up", up)):
        yield Weight(f"{name}.{matrix}", rows * width)
        if has_bias:
            yield Weight(f"{name}.{matrix}.bias", rows, decays=False)
    for matrix, rows in (("o", q), ("down", mlp)):
        yield Weight(f"{name}.{matrix}", rows * width)
        if has_bias:
            yield Weight(f"{name}.{matrix}.bias", width, decays=False)
    yield from _attention_vectors(model, tensor, name)


def _attention_vectors(model: ModelConfig, tensor: int, name: str) -> Iterator[Weight]:
    q, kv = model.hidden_size // tensor, kv_width(model, tensor)
    norms = {"none": {}, "head": {"q_norm": model.head_dim, "k_norm": model.head_dim}, "full": {"q_norm": q, "k_norm": kv}}[model.qk_norm]
    sinks = {"learned": {"sink": model.num_heads // tensor}, "kv_bias": {"sink": 2 * kv}}.get(model.sink, {})
    for vector, elements in {**norms, **sinks}.items():
        yield Weight(f"{name}.{vector}", elements, decays=False)


def kv_width(model: ModelConfig, tensor: int) -> int:
    """Channels of the keys on one rank: whole heads, at least one."""
    return max(1, model.num_kv_heads // tensor) * model.head_dim


def exchanged_kv_width(model: ModelConfig, tensor: int, context: int) -> int:
    """Channels of the keys that go to the ranks of a sequence: with fewer heads than ranks, each to several."""
    return max(kv_width(model, tensor), context * model.head_dim)
