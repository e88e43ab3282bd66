"""One transformer block: pre-norm attention and MLP on the residual stream, with recompute and dropout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastab.config.schema import ModelConfig, Recompute
from megastab.model.attention import Attention
from megastab.model.context import Context
from megastab.model.kv_cache import KVCache
from megastab.model.mlp import MLP
from megastab.model.norms import build_norm
from megastab.parallel import rng
from megastab.parallel.grid import TensorParallel


def _recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    # Dropout masks are functions of position, so there is no generator state to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, site, sample, position, channel): equal at every layout and on every replay."""

    def __init__(self, rate: float, seed: int, *site: object):
        super().__init__()
        self.rate, self.site = rate, rng.dropout_site(seed, *site)

    def forward(self, x_TD: Tensor, context: Context, tp: TensorParallel) -> Tensor:
        """[T, D] -> [T, D]; the identity in evaluation."""
        if not self.training or self.rate == 0.0 or context.sample_ids is None:
            return x_TD
        tokens_T = context.local_tokens(tp, x_TD.device)
        samples_T = context.sample_ids[tokens_T // context.seq]
        return rng.dropout(x_TD, self.rate, self.site, samples_T, tokens_T % context.seq)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, layer: int, recompute: Recompute = "none", seed: int = 0):
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.attention_norm = build_norm(f"layers.{layer}.attention_norm", config, tp, layer)
        self.attention = Attention(config, tp, layer)
        self.mlp_norm = build_norm(f"layers.{layer}.mlp_norm", config, tp, layer)
        self.mlp = MLP(config, tp, layer)
        self.attention_dropout = Dropout(config.dropout, seed, layer, "attention")
        self.mlp_dropout = Dropout(config.dropout, seed, layer, "mlp")

    def forward(self, x_TD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        if self.training and self.recompute == "full":
            return _recomputed(self._run, x_TD, context, None)
        return self._run(x_TD, context, cache)

    def _run(self, x_TD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        x_TD = x_TD + self.attention_dropout(self._attention(self.attention_norm(x_TD), context, cache), context, self.tp)
        return x_TD + self.mlp_dropout(self._mlp(self.mlp_norm(x_TD)), context, self.tp)

    def _attention(self, x_TD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        if not self._selects():
            return self.attention(x_TD, context, cache)
        return self.attention.o(_recomputed(self.attention.mix, self.attention.project(x_TD), context))

    def _mlp(self, x_TD: Tensor) -> Tensor:
        if not self._selects():
            return self.mlp(x_TD)
        return self.mlp.down(_recomputed(self.mlp.activate, self.mlp.up(x_TD)))

    def _selects(self) -> bool:
        """Whether to keep only the products' inputs and recompute what is cheap: the mix of heads and the activation."""
        return self.training and self.recompute == "selective"
