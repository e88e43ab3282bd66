"""Bytes that a piece of code holds at its worst, by the tensors it makes: what the machine says depends on its allocator."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakOfTensors(TorchDispatchMode):
    """Counts storages born inside the block while any tensor of them lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._live: dict[int, list[int]] = {}
        """Storage -> bytes, tensors that hold it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, held)
        return out

    def _note(self, tensor: Tensor, held: set[int]) -> None:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in held and key not in self._live:
            return  # a view of what was there before
        entry = self._live.setdefault(key, [size, 0])
        if not entry[1]:
            self.now += size
            self.peak = max(self.peak, self.now)
        entry[1] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        entry = self._live.get(key)
        if entry is not None:
            entry[1] -= 1
            if not entry[1]:
                self.now -= entry[0]
                del self._live[key]
