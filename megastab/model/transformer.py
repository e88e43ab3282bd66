"""The whole network on one rank's share, for the plain engine; ``stages.py`` cuts the same layers for the pipeline."""

from __future__ import annotations

from torch import Tensor, nn

from megastab.config.schema import Megastab, ModelConfig
from megastab.model.block import Block
from megastab.model.context import Context
from megastab.model.counts import entrance, has_final_norm
from megastab.model.embedding import EmbeddingScale, Head, Positions, TokenEmbedding
from megastab.model.kv_cache import KVCache
from megastab.model.loss import cross_entropy, soft_cap
from megastab.model.norms import build_norm
from megastab.parallel.grid import ALONE, Axis, TensorParallel


class Transformer(nn.Module):
    """GPT or LLaMA. Called with targets it returns the weighted sum of their losses; ``logits`` is the network alone."""

    def __init__(self, config: Megastab, tp: TensorParallel = ALONE, cp: Axis = ALONE):
        super().__init__()
        model, seed = config.model, config.run.seed
        self.config: ModelConfig = model
        self.tp, self.cp, self.z_loss = tp, cp, config.loss.z_loss
        self.embedding = TokenEmbedding(model, tp)
        layers = entrance(model)
        self.scale = EmbeddingScale(model, tp) if "scale" in layers else nn.Identity()
        self.positions = Positions(model, tp, seed) if "positions" in layers else None
        self.embedding_norm = build_norm("embedding_norm", model, tp) if "norm" in layers else nn.Identity()
        self.blocks = nn.ModuleList(Block(model, tp, layer, config.parallel.recompute, seed) for layer in range(model.num_layers))
        self.norm = build_norm("final_norm", model, tp) if has_final_norm(model) else nn.Identity()
        self.head = Head(model, tp, tied=self.embedding.weight if model.tie_embeddings else None)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor,
        sample_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, S] ids and targets, S this rank's positions of each sample -> sum of ``weights`` times losses (fp32 scalar, equal on every tp
        rank)."""
        batch, seq = tokens.shape
        context = Context.of_share(self.cp, batch, seq, sample_ids, document_ids)
        logits_GV = self._uncapped(tokens, context)
        model = self.config
        return cross_entropy(logits_GV, labels, weights, model.vocab_size or 0, self.z_loss, self.tp, model.logit_softcap)

    def logits(self, tokens: Tensor, context: Context | None = None, caches: list[KVCache] | None = None) -> Tensor:
        """[B, S] ids -> [B*S, V] logits of this rank's vocabulary rows, in the weights' dtype, soft-capped where the model says so."""
        logits_GV = self._uncapped(tokens, context or Context(*tokens.shape), caches)
        cap = self.config.logit_softcap
        return logits_GV if cap is None else soft_cap(logits_GV, cap).to(logits_GV.dtype)

    def _uncapped(self, tokens: Tensor, context: Context, caches: list[KVCache] | None = None) -> Tensor:
        """What the head gives: the loss caps it a chunk at a time."""
        x_TD = self.scale(self.embedding(tokens.reshape(-1)))
        if self.positions is not None:
            x_TD = self.positions(x_TD, context)
        x_TD = self.embedding_norm(x_TD)
        for i, block in enumerate(self.blocks):
            x_TD = block(x_TD, context, caches[i] if caches else None)
        return self.head(self.norm(x_TD))
