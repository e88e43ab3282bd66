"""Random numbers as functions of names and positions, so that every layout draws the same ones.

Weights: fixed tiles of 64 K elements, each from numpy's Philox keyed by (seed, canonical name, tile); a rank draws only the tiles
that overlap what it holds. Dropout: a hash of (seed, site, sample, position, channel), evaluated where the element lives.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

TILE = 1 << 16  # elements per tile: large enough for the generator's set-up to vanish, small enough to waste little at a cut


def key(seed: int, *names: object) -> int:
    """A 128-bit key from a seed and names."""
    text = "|".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def _draw_tile(seed: int, name: str, tile: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=key(seed, name, tile))).standard_normal(TILE, dtype=np.float32)


def fill_normal_(out: Tensor, std: float, seed: int, name: str, start: int) -> None:
    """Fill ``out`` (1-D) with elements [start, start + len) of the standard normal stream of ``name``, times ``std``."""
    stop = start + out.numel()
    for tile in range(start // TILE, -(-stop // TILE)):
        low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
        values = torch.from_numpy(_draw_tile(seed, name, tile)[low - tile * TILE : high - tile * TILE])
        out[low - start : high - start].copy_(values * std)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 with full avalanche (Wellons' ``lowbias32`` constants); products wrap."""
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _shift(x, 16)


def dropout_site(seed: int, *names: object) -> int:
    """A signed 32-bit key for one place in the model where dropout acts."""
    return (key(seed, "dropout", *names) & 0xFFFFFFFF) - (1 << 31)


def dropout(x_TD: Tensor, rate: float, site: int, samples_T: Tensor, positions_T: Tensor) -> Tensor:
    """Zero each element with probability ``rate`` and scale the rest; the mask depends on (site, sample, position, channel) only.

    Args:
        x_TD: activations, a token a row.
        rate: in [0, 1).
        site: from :func:`dropout_site`.
        samples_T: int64 global sample index of each token.
        positions_T: int64 position of each token in its sample.
    """
    low, high = samples_T.to(torch.int32), (samples_T >> 31).to(torch.int32)
    token_T = _mix(_mix(_mix(low ^ site) ^ high) ^ positions_T.to(torch.int32))
    stride_T = _mix(token_T ^ 0x5BD1E995) | 1  # odd: channels of a token never collide
    channels_D = torch.arange(x_TD.shape[-1], dtype=torch.int32, device=x_TD.device)
    bits_TD = _shift(_mix(token_T[:, None] + stride_T[:, None] * channels_D), 8)  # 24 uniform bits
    return torch.where(bits_TD >= int(rate * (1 << 24)), x_TD, 0.0) * (1.0 / (1.0 - rate))
