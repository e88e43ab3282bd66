"""The network as a list of layer specifications, for DeepSpeed's pipeline.

Between stages travels the residual stream, followed by the side inputs the run needs (sample ids with dropout, document ids with a
document mask): first the one tensor that has a gradient, as DeepSpeed demands, and shapes that never change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megastab.config.schema import Megastab, ModelConfig
from megastab.model.block import Block
from megastab.model.context import Context
from megastab.model.counts import entrance, has_final_norm, layer_costs
from megastab.model.embedding import EmbeddingScale, Head, Positions, TokenEmbedding, tied_head
from megastab.model.loss import cross_entropy
from megastab.model.norms import build_norm
from megastab.parallel.grid import ALONE, Axis, TensorParallel

Payload = Tensor | tuple[Tensor, ...]


class Sides:
    """Packs and unpacks what travels beside the residual stream."""

    def __init__(self, config: Megastab, tp: TensorParallel, cp: Axis):
        self.cp = cp
        self.has_samples = config.model.dropout > 0.0
        self.has_documents = config.data.document_mask
        self.seq = config.model.max_seq_len // cp.size
        self.share = tp.size if tp.sequence else 1

    def pack(self, x: Tensor, sample_ids: Tensor | None, document_ids: Tensor | None) -> Payload:
        """First tensor and the sides this run sends."""
        sides = (sample_ids if self.has_samples else None, document_ids if self.has_documents else None)
        present = tuple(side for side in sides if side is not None)
        return (x, *present) if present else x

    def unpack(self, payload: Payload) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """The first tensor, the sides as they came, and (sample ids, document ids) or None."""
        x, *sides = payload if isinstance(payload, tuple) else (payload,)
        named = iter(sides)
        samples = next(named) if self.has_samples else None
        documents = next(named) if self.has_documents else None
        return x, tuple(sides), samples, documents


class Layer(nn.Module):
    """One layer on the payload: unpack, run, pass the sides on."""

    def __init__(self, build: Callable[[], nn.Module], sides: Sides):
        super().__init__()
        self.sides, self.inner = sides, build()

    def forward(self, payload: Payload) -> Payload:
        """Residual stream and sides in, the same out."""
        x_TD, rest, samples, documents = self.sides.unpack(payload)
        sides = self.sides
        context = Context.of_share(sides.cp, x_TD.shape[0] * sides.share // sides.seq, sides.seq, samples, documents)
        out = self.inner(x_TD, context) if isinstance(self.inner, (Block, Positions)) else self.inner(x_TD)
        return (out, *rest) if rest else out


class _Embedding(TokenEmbedding):
    """The first layer: its payload carries [B, S] token ids instead of the residual stream."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, sides: Sides):
        super().__init__(config, tp)
        self.sides = sides

    def forward(self, payload: Payload) -> Payload:  # type: ignore[override]
        """Ids and sides -> residual stream and sides."""
        tokens, rest, _, _ = self.sides.unpack(payload)
        x_TD = super().forward(tokens.reshape(-1))
        return (x_TD, *rest) if rest else x_TD


def _tied_head(embedding: _Embedding, payload: Payload) -> Tensor:
    return tied_head(embedding, embedding.sides.unpack(payload)[0])


class _Head(Head):
    """The last layer: only the logits leave it."""

    def forward(self, payload: Payload) -> Tensor:
        """Residual stream (and sides) -> logits."""
        return super().forward(payload[0] if isinstance(payload, tuple) else payload)


def layer_specs(config: Megastab, tp: TensorParallel, cp: Axis = ALONE) -> tuple[list[Any], list[int]]:
    """DeepSpeed layer specifications and the cost of each, from which stages are cut without building anything."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    model, seed, sides = config.model, config.run.seed, Sides(config, tp, cp)

    def spec(build: Callable[[], nn.Module]) -> Any:
        return LayerSpec(Layer, build, sides)

    def tie(forward: Any) -> Any:
        return TiedLayerSpec("embedding", _Embedding, model, tp, sides, forward_fn=forward, tied_weight_attr="weight")

    specs = [tie(None) if model.tie_embeddings else LayerSpec(_Embedding, model, tp, sides)]
    before = {
        "scale": lambda: EmbeddingScale(model, tp),
        "positions": lambda: Positions(model, tp, seed),
        "norm": lambda: build_norm("embedding_norm", model, tp),
    }
    specs += [spec(before[layer]) for layer in entrance(model)]
    for i in range(model.num_layers):
        specs.append(spec(lambda i=i: Block(model, tp, i, config.parallel.recompute, seed)))  # type: ignore[misc]
    if has_final_norm(model):
        specs.append(spec(lambda: build_norm("final_norm", model, tp)))
    specs.append(tie(_tied_head) if model.tie_embeddings else LayerSpec(_Head, model, tp))
    return specs, layer_costs(model)


def pipeline_loss(config: Megastab, tp: TensorParallel) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """``loss_fn(logits, (labels, weights))`` for the last stage."""

    def loss(logits_GV: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        model = config.model
        return cross_entropy(logits_GV, *targets, model.vocab_size or 0, config.loss.z_loss, tp, model.logit_softcap)

    return loss
