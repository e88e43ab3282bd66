"""One transformer block: attention and MLP on the residual stream, with their norms, recompute and dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastab.config.schema import ModelConfig, Recompute
from megastab.model.attention import Attention
from megastab.model.context import Context
from megastab.model.kv_cache import KVCache
from megastab.model.mlp import MLP
from megastab.model.norms import build_branch_norms
from megastab.parallel import rng
from megastab.parallel.grid import TensorParallel

Map = Callable[[Tensor], Tensor]
Around = Callable[[Callable[[], Tensor]], Tensor]  # runs a block's forward and returns what it returns


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
        return rng.dropout(x_TD, self.rate, self.site, samples_T, tokens_T % context.seq + context.first_position)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream; ``norm_position`` says where their norms are."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, layer: int, recompute: Recompute = "none", seed: int = 0):
        super().__init__()
        self.tp, self.recompute, self.norm_position = tp, recompute, config.norm_position
        self.attention_norm, self.attention_output_norm = build_branch_norms("attention", config, tp, layer)
        self.attention = Attention(config, tp, layer)
        self.mlp_norm, self.mlp_output_norm = build_branch_norms("mlp", config, tp, layer)
        self.mlp = MLP(config, tp, layer)
        self.attention_dropout = Dropout(config.dropout, seed, layer, "attention")
        self.mlp_dropout = Dropout(config.dropout, seed, layer, "mlp")
        self.around: Around | None = None  # set where activations are offloaded

    def forward(self, x_TD: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """[T, D] -> [T, D]."""
        if self.around is not None and self.training and torch.is_grad_enabled():
            return self.around(lambda: self._recomputing(x_TD, context, None))
        return self._recomputing(x_TD, context, cache)

    def _recomputing(self, x_TD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        if self.training and self.recompute == "full":
            return _recomputed(self._run, x_TD, context, None)
        return self._run(x_TD, context, cache)

    def _run(self, x_TD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        def attention(y_TD: Tensor) -> Tensor:
            return self._attention(y_TD, context, cache)

        def dropped(dropout: Dropout) -> Map:
            return lambda y_TD: dropout(y_TD, context, self.tp)

        x_TD = self._add(x_TD, attention, self.attention_norm, self.attention_output_norm, dropped(self.attention_dropout))
        return self._add(x_TD, self._mlp, self.mlp_norm, self.mlp_output_norm, dropped(self.mlp_dropout))

    def _add(self, x_TD: Tensor, branch: Map, norm: Map, output_norm: Map, dropout: Map) -> Tensor:
        """The residual stream with one branch on it."""
        match self.norm_position:
            case "pre":
                return x_TD + dropout(branch(norm(x_TD)))
            case "post":  # arXiv 1706.03762
                return output_norm(x_TD + dropout(branch(x_TD)))
            case "peri":  # arXiv 2502.02732
                return x_TD + dropout(output_norm(branch(norm(x_TD))))
            case "reordered":  # OLMo 2, arXiv 2501.00656
                return x_TD + dropout(output_norm(branch(x_TD)))

    def _attention(self, x_TD: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        if not self._selects():
            return self.attention(x_TD, context, cache)
        return self.attention.o(_recomputed(self._mix, context, *self.attention.project(x_TD)))

    def _mix(self, context: Context, *projected: Tensor) -> Tensor:
        """Tensors as arguments of their own: autograd then saves them, where hooks see them."""
        return self.attention.mix(projected, context)

    def _mlp(self, x_TD: Tensor) -> Tensor:
        if not self._selects():
            return self.mlp(x_TD)
        return self.mlp.down(_recomputed(self.mlp.activate, self.mlp.up(x_TD)))

    def _selects(self) -> bool:
        """Whether to keep only the products' inputs and recompute what is cheap: the mix of heads and the activation."""
        return self.training and self.recompute == "selective"
