"""Keys and values of the positions already seen, for sampling."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One layer's keys and values, in buffers of the longest sequence; heads are those of this rank."""

    def __init__(self, max_seq_len: int):
        self.max_seq_len = max_seq_len
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store S more positions and return everything so far, [B, L, K, H] each."""
        if self._keys is None or self._values is None:
            batch, _, heads, width = k_BSKH.shape
            self._keys, self._values = (
                torch.empty(batch, self.max_seq_len, heads, width, dtype=k_BSKH.dtype, device=k_BSKH.device) for _ in "kv"
            )
        stop = self.length + k_BSKH.shape[1]
        if stop > self.max_seq_len:
            raise ValueError(f"{stop} positions do not fit a cache of {self.max_seq_len}")
        self._keys[:, self.length : stop] = k_BSKH
        self._values[:, self.length : stop] = v_BSKH
        self.length = stop
        return self._keys[:, :stop], self._values[:, :stop]
