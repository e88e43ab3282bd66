"""Bytes of activations one rank keeps for backward: an estimate, from the tensors our blocks save.

Letters as in ``megastab.model``: G tokens of a micro-batch at this rank's positions, T = G, or G / tp under sequence parallel, D residual
width, a and k this rank's query and key channels, F its MLP channels, V its vocabulary rows, e bytes of an activation. Kept per block:

| recompute  | residual stream, T D e each    | attention, G e each                        | MLP, G e each                 |
|------------|--------------------------------|--------------------------------------------|-------------------------------|
| none       | norms' and branches' inputs    | fused q+k+v, turned q and k (llama), out   | gate+up, act(gate), product   |
| selective  | norms' and branches' inputs    | fused q+k+v, out                           | gate+up, product              |
| full       | the block's input              |                                            |                               |

plus, with an output gate, the gates and the gated output; with norms of queries and keys, these normed (gpt) and their inputs (by head);
with a kv_bias, its logits; and what is small: statistics of norms and softmax, rotary tables, dropout's masks. Where ranks share a
sequence, attention keeps what the exchange brought, its own share of the heads at all positions (as much as its share of the positions
with all heads, but for KV heads fewer than ranks, which go to several), and its output both as it left and as it came back; the fused
projection only where norms of queries and keys look into it. Recompute brings one block's share back while its backward runs. Not counted:
what a kernel allocates inside, what an exchange holds while it lasts, and the allocator's fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

from megastab.config.config import Config
from megastab.config.schema import ModelConfig, Recompute
from megastab.config.vocab import padded_vocab
from megastab.model.counts import gate_rows, has_final_norm, learns_embedding_scale, norms_of_a_branch
from megastab.plan.parameters import Stage, exchanged_kv_width, kv_width

FP32 = 4
INDEX = 8  # an int64 token id
ON_THEIR_WAY = 2  # blocks that leave while the next ones run, or come back while one's backward runs (engine.offload)
LOSS_CHUNK_ELEMENTS = 1 << 25  # model.loss: fp32 elements in flight on an accelerator


@dataclass(frozen=True)
class Activations:
    """Of one rank of a stage, in bytes."""

    per_micro_batch: int
    """Kept from a micro-batch's forward to its backward."""
    in_flight: int
    """Micro-batches between forward and backward at once (1F1B: as many as stages from here to the last)."""
    workspace: int
    """What backward adds for a moment: one block's recomputed share, or the gradient of the logits."""
    away: int = 0
    """Of a micro-batch's, what waits outside the device."""
    moving: int = 0
    """Of that, what is still or again on the device, once: blocks on their way."""

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        return (self.per_micro_batch - self.away) * self.in_flight + self.moving + self.workspace

    @property
    def outside(self) -> int:
        """In host memory or on the disk at once."""
        return self.away * self.in_flight


@dataclass(frozen=True)
class Shape:
    """Sizes of one micro-batch on one rank."""

    samples: int
    seq: int
    """Positions of a whole sequence."""
    local_tokens: int
    """T: tokens on this rank's residual stream."""
    element: int
    """Bytes of an activation."""
    tensor: int
    context: int
    """Ranks that share each sequence."""

    @classmethod
    def of(cls, config: Config) -> Shape:
        """A training micro-batch."""
        seq, tensor, context = config.megastab.model.max_seq_len, config.layout.tensor, config.layout.context
        tokens = config.micro_batch * seq // context
        local = tokens // tensor if config.megastab.parallel.sequence else tokens
        return cls(config.micro_batch, seq, local, FP32 if config.precision == "fp32" else 2, tensor, context)

    @property
    def positions(self) -> int:
        """Of each sample on this rank."""
        return self.seq // self.context

    @property
    def tokens(self) -> int:
        """G: tokens of the micro-batch on this rank."""
        return self.samples * self.positions

    def stream(self, model: ModelConfig) -> int:
        """Bytes of the residual stream."""
        return self.local_tokens * model.hidden_size * self.element

    def channels(self, count: int) -> int:
        """Bytes of ``count`` channels of every token."""
        return self.tokens * count * self.element


def activations(config: Config, stage: Stage, share: float = 1.0) -> Activations:
    """What one rank of ``stage`` keeps; ``share``: of what may be offloaded (``parallel.activation_offload``), how much is."""
    model, recompute, shape = config.megastab.model, config.megastab.parallel.recompute, Shape.of(config)
    kept = stage.num_blocks * block_bytes(model, shape, recompute)
    if stage.has_embedding:
        kept += embedding_bytes(model, shape)
    workspace = 0
    if recompute != "none" and stage.num_blocks:
        workspace = block_bytes(model, shape, "none") - (0 if recompute == "full" else block_bytes(model, shape, recompute))
    if stage.has_head:
        kept += head_bytes(model, shape)
        columns = padded_vocab(model.vocab_size or 0) // shape.tensor
        chunk = FP32 * min(shape.tokens * columns, LOSS_CHUNK_ELEMENTS) * (1 if model.logit_softcap is None else 2)
        workspace = max(workspace, shape.channels(columns) + chunk)
    elif config.layout.pipeline > 1:
        kept += shape.stream(model)  # the output waits for its gradient
    held = in_flight(config, stage)
    limit = config.megastab.parallel.activation_offload.max_gb
    one = movable(config)
    away = int(share * one * max(0, stage.num_blocks - 1))
    if limit is not None:
        away = min(away, int(limit * 1e9) // held)
    return Activations(kept, held, workspace, away, min(away, ON_THEIR_WAY * one))


def movable(config: Config) -> int:
    """Bytes of one block and micro-batch that may leave the device (``engine.offload``): storages that are not too small."""
    parallel, model = config.megastab.parallel, config.megastab.model
    if parallel.activation_offload.kind == "none":
        return 0
    least = parallel.activation_offload.min_kb * 1024
    return sum(size for size in block_storages(model, Shape.of(config), parallel.recompute) if size >= least)


def in_flight(config: Config, stage: Stage) -> int:
    """Micro-batches a stage holds at once under 1F1B."""
    return min(config.layout.pipeline - stage.index, config.accumulation)


def block_bytes(model: ModelConfig, shape: Shape, recompute: Recompute) -> int:
    """What one block keeps of one micro-batch."""
    return sum(block_storages(model, shape, recompute))


def block_storages(model: ModelConfig, shape: Shape, recompute: Recompute) -> list[int]:
    """Bytes of each storage that one block keeps of one micro-batch."""
    if recompute == "full":
        return [shape.stream(model)]
    dropout = 2 * [shape.local_tokens * model.hidden_size] if model.dropout else []  # one byte an element, both sites
    count = norms_of_a_branch(model)
    norms = 2 * (count + 1) * [shape.stream(model)] + 2 * count * [norm_statistics(model, shape)]  # the branch keeps its input, too
    kept = [*norms, *dropout, *_attention_storages(model, shape, recompute), *_mlp_storages(model, shape, recompute)]
    return [size for size in kept if size]


def norm_statistics(model: ModelConfig, shape: Shape) -> int:
    """Per token the inverse deviation, and LayerNorm's mean; DyT has none."""
    return shape.local_tokens * FP32 * {"layernorm": 2, "dyt": 0}.get(model.norm, 1)


def _attention_storages(model: ModelConfig, shape: Shape, recompute: Recompute) -> list[int]:
    q, kv = model.hidden_size // shape.tensor, kv_width(model, shape.tensor)
    gates = shape.channels(gate_rows(model) // shape.tensor)
    fused = shape.channels(q + 2 * kv) + gates  # values are views of the fused projection and keep the whole of it
    out = [shape.channels(q)]
    if recompute == "selective":
        return [fused, *out]
    logits = shape.tokens * (model.num_heads // shape.tensor) * FP32
    softmax = [logits] * (2 if model.sink == "kv_bias" else 1)  # its own logits as well
    gated = [gates, *out] if gates else []
    is_normed, is_turned = model.qk_norm != "none", model.arch == "llama"
    table = 2 * [shape.positions * model.head_dim // 2 * shape.element] if is_turned else []
    given = [shape.channels(q), shape.channels(kv)] if is_turned or is_normed else []  # what attention is given; without either, views
    if is_turned and not is_normed and model.num_kv_heads < shape.tensor:
        fused = shape.channels(2 * kv)  # queries are projected apart, and nothing needs them unturned
    if shape.context > 1:
        given, out = _exchanged(model, shape, q), 2 * out
        fused = fused if model.qk_norm == "full" else 0
    return [fused, *_qk_norm_storages(model, shape, q, kv), *given, *table, *softmax, *out, *gated]


def _exchanged(model: ModelConfig, shape: Shape, q: int) -> list[int]:
    """Queries, keys and values as the exchange brings them: of one sample in one piece, of several copied apart."""
    kv = exchanged_kv_width(model, shape.tensor, shape.context)
    return [shape.channels(q + 2 * kv)] if shape.samples == 1 else [shape.channels(width) for width in (q, kv, kv)]


def _qk_norm_storages(model: ModelConfig, shape: Shape, q: int, kv: int) -> list[int]:
    """Inputs of the norms of queries and keys, where they are no views, and their inverse deviations."""
    if model.qk_norm == "head":
        return [size for width in (q, kv) for size in (shape.channels(width), shape.tokens * FP32 * width // model.head_dim)]
    return 2 * [shape.tokens * FP32] if model.qk_norm == "full" else []


def _mlp_storages(model: ModelConfig, shape: Shape, recompute: Recompute) -> list[int]:
    width = shape.channels(model.ffn_hidden_size // shape.tensor)
    mask = width // shape.element  # a boolean a channel
    into = 2 * width if model.arch == "llama" else width
    if recompute == "selective":
        return [into, width]
    # What the activation saves besides its input, and whether it needs its input at all (relu saves its output).
    activation, needs_input = {"relu": (0, False), "relu2": (width, False), "topk": (mask, False)}.get(model.activation, (0, True))
    if model.arch == "llama":
        return [into, width, activation, width]  # the product of act(gate) and up keeps both factors
    return [into if needs_input else 0, activation, width]


def embedding_bytes(model: ModelConfig, shape: Shape) -> int:
    """Token ids; with tensor parallelism the places that are another rank's, with gpt positions and dropout's mask; what the learned
    scale and the norm are given."""
    ids = shape.tokens * INDEX * (2 if model.arch == "gpt" else 1)
    dropped = shape.local_tokens * model.hidden_size if model.dropout else 0
    scale = shape.stream(model) if learns_embedding_scale(model) else 0
    norm = shape.stream(model) + norm_statistics(model, shape) if model.embedding_norm else 0
    return ids + (shape.tokens if shape.tensor > 1 else 0) + dropped + scale + norm


def head_bytes(model: ModelConfig, shape: Shape) -> int:
    """Input of the final norm, input of the head, the logits once, and a few numbers a token."""
    columns = padded_vocab(model.vocab_size or 0) // shape.tensor
    per_token = 2 * INDEX + 1 + 2 * FP32
    norm = shape.stream(model) + norm_statistics(model, shape) if has_final_norm(model) else 0
    return norm + shape.stream(model) + shape.channels(columns) + shape.tokens * per_token
