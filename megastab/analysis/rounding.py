"""Rounding as integer formats do it, on plain tensors: what a number becomes when 8 or 4 bits keep it.

* ``absmax``: symmetric about 0, ``scale = max|x| / n`` with n = 2^(bits-1) - 1, codes ``clamp(round(x / scale), -n, n)``.
* ``zeropoint``: asymmetric, n = 2^bits - 1 steps from ``lo = min(x, 0)`` to ``hi = max(x, 0)``, ``scale = (hi - lo) / n``,
  ``zero = round(-lo / scale)``, codes ``clamp(round(x / scale) + zero, 0, n)``, so that 0 stays 0.

The two forms of section 5.2 of arXiv 2410.17174 as reproductions of it define them; ties go to the even code. One scale serves what
``dims`` reduces: every axis (a tensor), or all but one (a row, a channel, a token). Computed in fp32 or wider, returned in the dtype
given. A slice of zeros comes back as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Dims = int | tuple[int, ...] | None


class Codes(NamedTuple):
    """Integers (in a floating dtype) and what turns them back: ``(codes - zero) * scale``."""

    codes: Tensor
    scale: Tensor
    """Positive; of the shape of the codes with 1 along the reduced axes."""
    zero: Tensor
    """The code of 0; 0 where the format is symmetric."""

    def values(self) -> Tensor:
        """The numbers the codes stand for."""
        return (self.codes - self.zero) * self.scale


def largest(x: Tensor, dims: Dims = None) -> Tensor:
    """max|x| over ``dims`` (all of them: None), kept as axes of length 1; fp32 or wider."""
    dims = tuple(range(x.ndim)) if dims is None else dims
    return _wide(x).abs().amax(dims, keepdim=True)


def absmax_codes(x: Tensor, bits: int = 8, dims: Dims = None, limit: Tensor | None = None) -> Codes:
    """Symmetric codes of ``x``.

    Args:
        x: any shape.
        bits: of a code, at least 2.
        dims: the axes one scale serves; None is all of them.
        limit: what the outermost code stands for, instead of the largest of ``x`` (a static scale); beyond it is cut. Broadcasts.
    """
    top = 2 ** (bits - 1) - 1
    limit = largest(x, dims) if limit is None else _wide(limit)
    scale = _nonzero(limit / top)
    return Codes((_wide(x) / scale).round().clamp(-top, top), scale, torch.zeros_like(scale))


def zeropoint_codes(x: Tensor, bits: int = 4, dims: Dims = None) -> Codes:
    """Asymmetric codes of ``x``; arguments as of :func:`absmax_codes`."""
    steps = 2**bits - 1
    dims, wide = tuple(range(x.ndim)) if dims is None else dims, _wide(x)
    low, high = wide.amin(dims, keepdim=True).clamp(max=0), wide.amax(dims, keepdim=True).clamp(min=0)
    scale = _nonzero((high - low) / steps)
    zero = (-low / scale).round()
    return Codes(((wide / scale).round() + zero).clamp(0, steps), scale, zero)


def absmax(x: Tensor, bits: int = 8, dims: Dims = None, limit: Tensor | None = None) -> Tensor:
    """``x`` through :func:`absmax_codes` and back, in its dtype."""
    return absmax_codes(x, bits, dims, limit).values().to(x.dtype)


def zeropoint(x: Tensor, bits: int = 4, dims: Dims = None) -> Tensor:
    """``x`` through :func:`zeropoint_codes` and back, in its dtype."""
    return zeropoint_codes(x, bits, dims).values().to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _nonzero(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
