"""Rotary position embedding (arXiv 2104.09864), half-rotation form: channel i turns with channel i + H/2, as in Hugging Face LLaMA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_table(seq: int, head_dim: int, theta: float, device: torch.device, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [first, first + seq): two [S, H/2] fp32 tensors.

    Computed, never a buffer: an engine that casts the model to bf16 would round it, and at long positions the angle with it.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.outer(torch.arange(first, first + seq, dtype=torch.float64, device=device), frequencies)
    return angles.cos().float(), angles.sin().float()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    return out


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing but the table is saved."""

    @staticmethod
    def forward(ctx: Any, x_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSNH, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def rotate(x_BSNH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn [B, S, N, H] by the angles of ``table``; products in the activations' dtype."""
    cos, sin = (t[:, None, :].to(x_BSNH.dtype) for t in table)
    return _Rotate.apply(x_BSNH, cos, sin)
