"""Rotary position embedding (arXiv 2104.09864), half-rotation form: channel i turns with channel i + H/2, as in Hugging Face LLaMA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megastab.config.schema import RopeScalingConfig


def rope_table(
    seq: int, head_dim: int, theta: float, device: torch.device, first: int = 0, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [first, first + seq): two [S, H/2] fp32 tensors.

    Computed, never a buffer: an engine that casts the model to bf16 would round it, and at long positions the angle with it.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, scaling)
    angles = torch.outer(torch.arange(first, first + seq, dtype=torch.float64, device=device), frequencies)
    return angles.cos().float(), angles.sin().float()


def scaled_frequencies(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Frequencies [H/2], in radians a position, as Llama 3 stretches them: see :class:`RopeScalingConfig`."""
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _turn_(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    low, high = x.chunk(2, dim=-1)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)


class _RotateSplit(torch.autograd.Function):
    """Splits a fused projection into runs of heads and turns the first of them.

    A rotation's gradient is the rotation back, so only the table is saved; and the gradients of all runs are written into one tensor
    where the split's own backward would concatenate them again.
    """

    @staticmethod
    def forward(ctx: Any, x_BSMH: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, ...], turned: int) -> tuple[Tensor, ...]:
        ctx.heads, ctx.turned, ctx.shape = heads, turned, x_BSMH.shape
        ctx.save_for_backward(cos, sin)
        runs = list(x_BSMH.split(heads, dim=2))
        for i in range(turned):
            turned_run = torch.empty_like(runs[i], memory_format=torch.contiguous_format)
            _turn_(turned_run, runs[i], cos, sin)
            runs[i] = turned_run
        return tuple(runs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx_BSMH = grads[0].new_empty(ctx.shape)
        for i, (run, grad) in enumerate(zip(dx_BSMH.split(ctx.heads, dim=2), grads, strict=True)):
            if i < ctx.turned:
                _turn_(run, grad, cos, -sin)
            else:
                run.copy_(grad)
        return dx_BSMH, None, None, None, None


def rotate_split(x_BSMH: Tensor, table: tuple[Tensor, Tensor], heads: tuple[int, ...], turned: int) -> tuple[Tensor, ...]:
    """Split [B, S, M, H] into runs of ``heads`` heads and turn the first ``turned`` runs by the angles of ``table``.

    Products are in the activations' dtype.
    """
    cos, sin = (t[:, None, :].to(x_BSMH.dtype) for t in table)
    return _RotateSplit.apply(x_BSMH, cos, sin, heads, turned)


def rotate(x_BSNH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn all heads of [B, S, N, H] by the angles of ``table``."""
    return rotate_split(x_BSNH, table, (x_BSNH.shape[2],), 1)[0]
