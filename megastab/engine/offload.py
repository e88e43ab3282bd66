"""Activation offload in the manner of SSDTrain (arXiv 2408.10013): what blocks save for backward waits outside the device's memory.

Saved-tensor hooks around each block's forward hand large tensors to threads that move them out. A storage saved by several operations
goes once; parameters, leaves, small tensors and the last block of a stage stay. When the gradient reaches a block's output, the block
before it is fetched. Handles live in the graph itself, so that micro-batches of a pipeline cannot be mixed up, and a graph that is
dropped, by an error or otherwise, takes its entries with it. What recompute computes again in backward is never moved.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from megastab.config.schema_offload import ActivationOffloadConfig
from megastab.engine.offload_amount import Seen, amounts
from megastab.engine.offload_disk import DiskStore
from megastab.engine.offload_mover import Entry, Mover
from megastab.engine.offload_store import HostStore
from megastab.model.block import Block
from megastab.parallel import collectives

ADDRESS = 64  # bytes; torch's own storages begin at multiples of it. Others' stay: what comes back must not lie between elements
ON_THEIR_WAY = 2  # blocks that may be on their way out before forward waits, where everything goes


@dataclass(frozen=True)
class Kept:
    """A saved tensor that stayed."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Moved:
    """A view of a storage that moved."""

    entry: Entry
    scope: Scope
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Scope:
    """One block in one micro-batch."""

    def __init__(self, position: int, previous: Scope | None, mover: Mover, budget: float):
        self.position, self.previous, self.mover, self.budget = position, previous, mover, budget
        self.entries: list[weakref.ref[Entry]] = []
        self.offered = self.sent = 0
        self.entered: Any = mover.lane.mark()
        self.saved: Any = None
        self.begun: Any = None
        self.waited = 0.0

    def begin(self, gradient: Tensor) -> None:
        """Backward has reached this block's output: fetch the block before."""
        if self.begun is not None:
            return
        self.begun = self.mover.lane.mark()
        for reference in reversed(self.previous.entries if self.previous else []):
            if (entry := reference()) is not None:
                self.mover.fetch(entry)

    def settle(self) -> None:
        """Wait until what is moved is out."""
        for reference in self.entries:
            if (entry := reference()) is not None:
                self.mover.settle(entry)


class Offloader:
    """Of one stage's blocks on one rank."""

    def __init__(self, blocks: list[Block], mover: Mover, takes_all: bool = False, min_bytes: int = 0):
        self.mover, self.takes_all, self.min_bytes = mover, takes_all, min_bytes
        self.counts = mover.counts
        self.last = len(blocks) - 1
        self.budgets: list[float] = [float("inf")] * len(blocks)
        """Bytes of each block that may go out."""
        self._known: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()
        self._scope: Scope | None = None
        self._finishing: Scope | None = None
        self._finished: Scope | None = None
        """Last blocks of the micro-batch whose backward is under way, and of the last one whose backward reached the first block."""
        for position, block in enumerate(blocks):
            block.around = partial(self.run, position, list(block.parameters()))

    def run(self, position: int, parameters: list[nn.Parameter], forward: Callable[[], Tensor]) -> Tensor:
        """A block's forward with what it saves moved out."""
        scope = self._enter(position)
        if position == self.last:
            out = forward()  # its backward comes at once
        else:
            with saved_tensors_hooks(partial(self._pack, scope, parameters), self._unpack):
                out = forward()
        scope.saved = self.mover.lane.mark()
        if out.requires_grad:
            out.register_hook(partial(self._begin, scope))
        self._wait_for_disk(scope)
        return out

    def _enter(self, position: int) -> Scope:
        before = self._scope
        if position == 0:
            before = None
            if self._finished is not None and not self.takes_all:
                self._plan(self._finished)
        self._scope = Scope(position, before if before and before.position == position - 1 else None, self.mover, self.budgets[position])
        return self._scope

    def _begin(self, scope: Scope, gradient: Tensor) -> None:
        scope.begin(gradient)
        if scope.position == self.last:
            self._finishing = scope
        elif scope.position == 0:
            self._finished, self._finishing = self._finishing, None

    def _plan(self, finished: Scope) -> None:
        """Budgets from the times of one micro-batch; as they are while the device has not passed its last mark."""
        chain: list[Scope] = []
        scope: Scope | None = finished
        while scope is not None:
            chain.insert(0, scope)
            scope = scope.previous
        out_rate, seconds = self.mover.out_rate.bytes_per_second, self.mover.lane.seconds
        if len(chain) <= self.last or math.isinf(out_rate):
            return
        in_rate = self.mover.in_rate.bytes_per_second
        seen = []
        for block, following in zip(chain, chain[1:], strict=False):
            saved, needed, begun = (seconds(chain[0].entered, mark) for mark in (block.saved, following.begun, block.begun))
            if saved is None or needed is None or begun is None:
                return
            seen.append(Seen(saved, needed, begun, following.waited, block.offered))
        self.budgets[: self.last] = amounts(seen, out_rate, out_rate if math.isinf(in_rate) else in_rate)

    def _wait_for_disk(self, scope: Scope) -> None:
        older: Scope | None = scope
        for _ in range(ON_THEIR_WAY):
            older = older.previous if older else None
        if self.takes_all and older is not None:
            older.settle()

    def _pack(self, scope: Scope, parameters: list[nn.Parameter], tensor: Tensor) -> Kept | Moved:
        if tensor.is_leaf and tensor.requires_grad:
            return Kept(tensor, tensor._version)  # itself: ZeRO-3 exchanges a parameter's data, and a leaf makes no cycle with its graph
        alias = tensor.detach()  # a tensor that its own node saved would otherwise keep itself alive
        entry = self._entry_of(scope, parameters, alias) if self._is_movable(alias) else None
        if entry is None:
            return Kept(alias, alias._version)
        return Moved(entry, scope, alias.dtype, alias.size(), alias.stride(), int(alias.storage_offset()))

    def _is_movable(self, tensor: Tensor) -> bool:
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()
        storage = tensor.untyped_storage()
        return is_plain and storage.nbytes() >= max(1, self.min_bytes) and storage.data_ptr() % ADDRESS == 0

    def _entry_of(self, scope: Scope, parameters: list[nn.Parameter], tensor: Tensor) -> Entry | None:
        storage = tensor.untyped_storage()
        known = self._known.get(int(StorageWeakRef(storage).cdata))
        if known is not None and known.version == tensor._version:
            self.counts.shared += 1
            return known
        begin, size = storage.data_ptr(), storage.nbytes()
        if any(begin <= p.data_ptr() < begin + size for p in parameters):
            return None  # a view of a weight, or of the flat buffer it lies in
        scope.offered += size
        is_probe = scope.position == 0 and scope.sent == 0  # something always goes, or the bandwidth would never be measured again
        entry = self.mover.send(tensor) if is_probe or scope.sent + size <= scope.budget else None
        if entry is None:
            self.counts.kept += size
            return None
        scope.sent += size
        scope.entries.append(weakref.ref(entry))
        self._known[entry.key] = entry
        return entry

    def _unpack(self, packed: Kept | Moved) -> Tensor:
        if isinstance(packed, Kept):
            if packed.tensor._version != packed.version:
                raise RuntimeError(f"a tensor {tuple(packed.tensor.shape)} that backward needs was changed in place after it was saved")
            return packed.tensor
        waited = self.counts.waited_seconds
        storage = self.mover.take(packed.entry).untyped_storage()
        packed.scope.waited += self.counts.waited_seconds - waited
        view = torch.empty(0, dtype=packed.dtype, device=packed.entry.device)
        return view.set_(storage, packed.offset + packed.entry.shift // view.itemsize, packed.size, packed.stride)


def offload_activations(module: nn.Module, config: ActivationOffloadConfig) -> Offloader | None:
    """Offload what the blocks of ``module`` save, as the config asks (collective over the job); None where it asks for nothing.

    Raises:
        UserError: the folder cannot be used.
    """
    if config.kind == "none":
        return None
    limit = None if config.max_gb is None else int(config.max_gb * 1e9)
    with collectives.together("opening megastab.parallel.activation_offload.folder"):
        store = DiskStore(config.folder or "", limit) if config.kind == "ssd" else HostStore(limit)
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    return Offloader(blocks, Mover(store), config.amount == "all", int(config.min_kb * 1024))
