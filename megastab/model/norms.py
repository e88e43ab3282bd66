"""Normalisation layers. Statistics and the normalised value are fp32 whatever the activations' dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig
from megastab.parallel.grid import TensorParallel
from megastab.parallel.layers import replicated
from megastab.parallel.param_info import Part


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm with its own backward: torch's decomposes on CPU, in bf16 to 20x the time of layer norm."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        mean_square_T = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x_TD.shape[-1])
        inverse_T = mean_square_T.add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, gain_D, inverse_T)
        return (x_TD * inverse_T).mul_(gain_D).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gain_D, inverse_T = ctx.saved_tensors
        unit_TD = x_TD * inverse_T  # fp32: inverse_T is
        dy_TD = unit_TD * grads[0]
        dgain_D = dy_TD.sum(0).to(gain_D.dtype)
        along_T = (dy_TD @ gain_D.float()).div_(x_TD.shape[-1]).unsqueeze_(-1)  # mean over D of unit * gain * dy
        torch.mul(grads[0], gain_D, out=dy_TD) if dy_TD.dtype == grads[0].dtype else dy_TD.copy_(grads[0]).mul_(gain_D)
        dx_TD = dy_TD.sub_(unit_TD.mul_(along_T)).mul_(inverse_T)
        return dx_TD.to(x_TD.dtype), dgain_D, None


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last of two dimensions."""
    return _RMSNormFunction.apply(x_TD, gain_D, eps)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gain`` (arXiv 1910.07467)."""

    def __init__(self, name: str, width: int, eps: float, tp: TensorParallel, layer: int | None):
        super().__init__()
        self.eps = eps
        self.weight = replicated(Part.whole(name, "norm", width), None, tp, layer)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return _RMSNormFunction.apply(x_TD, self.weight, self.eps)


class RMSNormScalar(nn.Module):
    """RMSNorm with one gain for all channels (arXiv 2410.17174): a gain a channel would single channels out again."""

    def __init__(self, name: str, width: int, eps: float, tp: TensorParallel, layer: int | None):
        super().__init__()
        self.eps, self.width = eps, width
        self.weight = replicated(Part.whole(name, "norm", 1), None, tp, layer)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gain_D = self.weight.float().expand(self.width)  # fp32: its gradient is a sum over channels
        return _RMSNormFunction.apply(x_TD, gain_D, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * gain + bias`` (arXiv 1607.06450)."""

    def __init__(self, name: str, width: int, eps: float, tp: TensorParallel, layer: int | None):
        super().__init__()
        self.eps = eps
        self.weight = replicated(Part.whole(name, "norm", width), None, tp, layer)
        self.bias = replicated(Part.whole(f"{name}.bias", "bias", width), None, tp, layer)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return F.layer_norm(x_TD, (x_TD.shape[-1],), self.weight, self.bias, self.eps)


def build_norm(name: str, config: ModelConfig, tp: TensorParallel, layer: int | None = None) -> nn.Module:
    """The norm ``config.norm`` asks for."""
    kind = {"rmsnorm": RMSNorm, "rmsnorm_scalar": RMSNormScalar, "layernorm": LayerNorm}[config.norm]
    return kind(name, config.hidden_size, config.norm_eps, tp, layer)
