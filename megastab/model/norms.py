"""Normalisation layers, and dynamic tanh in their place. Statistics and what a gain multiplies are fp32 whatever the activations' dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

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


CHUNK_ELEMENTS = 1 << 17  # a thread's: what is made of a chunk stays in its cache, and threads do not meet too often

# arXiv 2503.10622, LLaMA: width -> initial alpha (before attention, everywhere else).
DYT_ALPHA = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
Site = Literal["attention", "other"]


def dyt_alpha(config: ModelConfig, site: Site) -> float:
    """Initial alpha: the config's; else the paper's for this width, log alpha linear in log width between two of its widths, and
    that of the nearest width outside them."""
    given = config.dyt.alpha_attention if site == "attention" else config.dyt.alpha_other
    if given is not None:
        return given
    table = {width: alphas[site != "attention"] for width, alphas in DYT_ALPHA.items()}
    width = min(max(config.hidden_size, min(table)), max(table))
    low, high = next((a, b) for a, b in pairwise(table) if a <= width <= b)
    share = math.log(width / low) / math.log(high / low)
    return float(table[low] ** (1 - share) * table[high] ** share)


def _chunks(x_TD: Tensor) -> Iterator[slice]:
    tokens, width = x_TD.shape
    rows = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // width) if x_TD.device.type == "cpu" else max(1, tokens)
    return (slice(start, start + rows) for start in range(0, tokens, rows))


class _DyTFunction(torch.autograd.Function):
    """Eager DyT, a few rows at a time: the cache holds what lies between input and output.

    Backward takes tanh of the saved input again. A tanh kept in bf16 is 1 from alpha |x| = 3.5 on, and its derivative 0.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, alpha_1: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, alpha_1, gain_D)
        alpha_1, gain_D, bias_D = (_wide(p) for p in (alpha_1, gain_D, bias_D))
        y_TD = torch.empty_like(x_TD)
        for rows in _chunks(x_TD):
            t = (x_TD[rows] * alpha_1).tanh_()
            y_TD[rows] = t.mul_(gain_D).add_(bias_D)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_TD, alpha_1, gain_D = ctx.saved_tensors
        dtype, (alpha_1, gain_D) = gain_D.dtype, (_wide(p) for p in (alpha_1, gain_D))
        dx_TD, sums_3D = torch.empty_like(x_TD), gain_D.new_zeros(3, len(gain_D))
        for rows in _chunks(x_TD):
            dy, x = _wide(grads[0][rows]), _wide(x_TD[rows])
            t = (x * alpha_1).tanh_()
            dyt = dy * t
            sums_3D[0].add_(_column_sums(dyt))
            sums_3D[1].add_(_column_sums(dy))
            slope = torch.sub(dy, t.mul_(dyt))  # dy (1 - t^2)
            sums_3D[2].add_(_column_sums(torch.mul(x, slope, out=dyt)))
            dx_TD[rows] = slope.mul_(gain_D * alpha_1)
        dalpha_1 = (sums_3D[2] * gain_D).sum().view(1)
        return dx_TD, dalpha_1.to(dtype), sums_3D[0].to(dtype), sums_3D[1].to(dtype)


class _CompiledDyTFunction(torch.autograd.Function):
    """The same for a compiler, which fuses whole tensors: on CPU, Inductor's tanh takes some four times as long as its exp."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, alpha_1: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, alpha_1, gain_D)
        return (_tanh(_wide(x_TD) * _wide(alpha_1)) * _wide(gain_D) + _wide(bias_D)).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_TD, alpha_1, gain_D = ctx.saved_tensors
        x, dy, alpha, gain = (_wide(t) for t in (x_TD, grads[0], alpha_1, gain_D))
        e = torch.exp(-2 * (alpha * x).abs())
        tanh = torch.copysign((1 - e) / (1 + e), alpha * x)
        slope = dy * (4 * e / (1 + e).square())  # dy (1 - tanh^2)
        dalpha_1 = (x * slope * gain).sum(1).sum().view(1)  # by rows: fused into the pass that makes dx
        sums = (dalpha_1, _column_sums(dy * tanh), dy.sum(0))
        return (slope * (gain * alpha)).to(x_TD.dtype), *(s.to(gain_D.dtype) for s in sums)


def _tanh(z: Tensor) -> Tensor:
    """From exp, whose rounding would be all that is left of a small result: there the series, 6e-8 off at 0.2."""
    e, w = torch.exp(-2 * z.abs()), z * z
    series = z * (1 + w * (-1 / 3 + w * (2 / 15 - w * (17 / 315))))
    return torch.where(z.abs() < 0.2, series, torch.copysign((1 - e) / (1 + e), z))


def _column_sums(x_TD: Tensor) -> Tensor:
    """[T, D] -> [D]; on CPU a product takes half the time of a sum, on an accelerator it might be one in TF32."""
    return x_TD.new_ones(len(x_TD)) @ x_TD if x_TD.device.type == "cpu" else x_TD.sum(0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DyT(nn.Module):
    """``gain * tanh(alpha x) + bias``, alpha one number a site (dynamic tanh, arXiv 2503.10622). Differs: released LLM code has no bias."""

    def __init__(self, name: str, width: int, alpha: float, tp: TensorParallel, layer: int | None):
        super().__init__()
        self.alpha = replicated(Part.whole(f"{name}.alpha", "scale", 1, initial=alpha), None, tp, layer)
        self.weight = replicated(Part.whole(name, "norm", width), None, tp, layer)
        self.bias = replicated(Part.whole(f"{name}.bias", "bias", width), None, tp, layer)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        function = _CompiledDyTFunction if torch.compiler.is_compiling() else _DyTFunction
        return function.apply(x_TD, self.alpha, self.weight, self.bias)


class Scaled(nn.Module):
    """A norm's output times a fixed factor."""

    def __init__(self, norm: nn.Module, factor: float):
        super().__init__()
        self.norm, self.factor = norm, factor

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.norm(x_TD) * self.factor


def build_norm(name: str, config: ModelConfig, tp: TensorParallel, layer: int | None = None, site: Site = "other") -> nn.Module:
    """The norm ``config.norm`` asks for."""
    if config.norm == "dyt":
        return DyT(name, config.hidden_size, dyt_alpha(config, site), tp, layer)
    kind = {"rmsnorm": RMSNorm, "rmsnorm_scalar": RMSNormScalar, "layernorm": LayerNorm}[config.norm]
    return kind(name, config.hidden_size, config.norm_eps, tp, layer)


def build_branch_norms(
    branch: Literal["attention", "mlp"], config: ModelConfig, tp: TensorParallel, layer: int
) -> tuple[nn.Module, nn.Module]:
    """The norms of a branch's input and output, the identity where ``norm_position`` has none."""
    name, position = f"layers.{layer}.{branch}", config.norm_position
    norm: nn.Module = nn.Identity()
    output_norm: nn.Module = nn.Identity()
    if position in ("pre", "peri"):
        site: Site = "attention" if branch == "attention" else "other"
        norm = build_norm(f"{name}_norm", config, tp, layer, site)
        if config.layer_norm_scaling:
            norm = Scaled(norm, 1 / math.sqrt(layer + 1))
    if position != "pre":
        output_norm = build_norm(f"{name}_output_norm", config, tp, layer)
    return norm, output_norm
