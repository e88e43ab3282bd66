"""RMSNorm of queries and keys, before they are rotated, so that no logit outgrows sqrt(H) times the gains. Statistics are fp32.

Letters: B batch, S positions, M heads on this rank, H head width, X = M * H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megastab.config.schema import ModelConfig
from megastab.model.norms import rms_norm
from megastab.parallel import collectives
from megastab.parallel.grid import TensorParallel, kv_copies
from megastab.parallel.layers import sharded, shared_by_heads
from megastab.parallel.param_info import Part


class HeadNorm(nn.Module):
    """Over each head, one gain for all of them (Qwen3, arXiv 2505.09388)."""

    def __init__(self, name: str, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = shared_by_heads(Part.whole(name, "norm", config.head_dim), tp, layer)

    def forward(self, x_BSMH: Tensor) -> Tensor:
        """[B, S, M, H] -> the same."""
        return rms_norm(x_BSMH.reshape(-1, x_BSMH.shape[-1]), self.weight, self.eps).view(x_BSMH.shape)


class FullNorm(nn.Module):
    """Over all heads of a position, those of other tp ranks included, a gain a channel (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, name: str, config: ModelConfig, tp: TensorParallel, layer: int, heads: int):
        super().__init__()
        copies, self.width = kv_copies(heads, tp.size), heads * config.head_dim
        self.eps, self.tp, self.copies = config.norm_eps, tp, copies
        self.weight = sharded((Part.cut(name, "norm", self.width, tp, copies),), None, tp, layer, copies)

    def forward(self, x_BSMH: Tensor) -> Tensor:
        """[B, S, M, H] -> the same."""
        x_GX = x_BSMH.flatten(2).flatten(0, 1)
        if self.tp.size == 1:
            return rms_norm(x_GX, self.weight, self.eps).view(x_BSMH.shape)
        return _over_ranks(x_GX, self.weight, self.eps, self.width * self.copies, self.tp).view(x_BSMH.shape)


@torch.compiler.disable
def _over_ranks(x_GX: Tensor, gain_X: Tensor, eps: float, channels: int, tp: TensorParallel) -> Tensor:
    return _NormOverRanks.apply(x_GX, gain_X, eps, channels, tp)


class _NormOverRanks(torch.autograd.Function):
    """RMSNorm of a row that lies on all tp ranks; ``channels`` counts every rank's, a copied head as often as it is held.

    Ranks that hold copies of a head each get a term of its gradient, from their own queries. The sum over ranks in backward adds these
    terms, and dividing what it gives by all ``channels`` shares it out among the copies again.
    """

    @staticmethod
    def forward(ctx: Any, x_GX: Tensor, gain_X: Tensor, eps: float, channels: int, tp: TensorParallel) -> Tensor:
        squares_G1 = torch.linalg.vector_norm(x_GX, dim=-1, keepdim=True, dtype=torch.float32).square_()
        collectives.sum_(squares_G1, tp.group)  # over tp: every rank holds some of the row's channels
        inverse_G1 = squares_G1.div_(channels).add_(eps).rsqrt_()
        ctx.channels, ctx.tp = channels, tp
        ctx.save_for_backward(x_GX, gain_X, inverse_G1)
        return (x_GX * inverse_G1).mul_(gain_X).to(x_GX.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_GX, gain_X, inverse_G1 = ctx.saved_tensors
        unit_GX, dy_GX = x_GX * inverse_G1, grads[0].float()
        along_G1 = (unit_GX * dy_GX * gain_X).sum(dim=-1, keepdim=True)
        collectives.sum_(along_G1, ctx.tp.group)  # over tp: the row's mean, as in forward
        dx_GX = (dy_GX * gain_X - unit_GX * along_G1.div_(ctx.channels)) * inverse_G1
        return dx_GX.to(x_GX.dtype), (unit_GX * dy_GX).sum(dim=0).to(gain_X.dtype), None, None, None


def build_qk_norms(name: str, config: ModelConfig, tp: TensorParallel, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and of keys that ``config.qk_norm`` asks for."""
    if config.qk_norm == "none":
        return None, None
    if config.qk_norm == "head":
        return HeadNorm(f"{name}.q_norm", config, tp, layer), HeadNorm(f"{name}.k_norm", config, tp, layer)
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    q_norm, k_norm = (FullNorm(f"{name}.{x}_norm", config, tp, layer, count) for x, count in heads.items())
    return q_norm, k_norm
