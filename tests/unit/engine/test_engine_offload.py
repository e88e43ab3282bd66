"""Activation offload: the gradients of a run without it, bit for bit; memory that is really given up; failures that lose nothing."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megastab.config.schema import Megastab
from megastab.engine.offload import Kept, Moved, Offloader, Scope
from megastab.engine.offload_disk import SUFFIX, DiskStore
from megastab.engine.offload_mover import Entry, Mover
from megastab.engine.offload_store import HostStore
from megastab.model.block import Block
from megastab.model.init import init_weights
from megastab.model.transformer import Transformer
from tests.memory import PeakOfTensors
from tests.ranks import RankFailed, run_ranks

SEQ, BATCH = 64, 2
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "gpt dropout": {"arch": "gpt", "dropout": 0.1},
    "gqa gated": {"arch": "llama", "num_kv_heads": 2, "output_gate": "element", "qk_norm": "head", "sink": "learned"},
}


def build(recompute: str = "none", layers: int = 4, **model: Any) -> Transformer:
    shape = {"num_layers": layers, "hidden_size": 64, "num_heads": 4, "max_seq_len": SEQ, "vocab_size": 128}
    config = Megastab.model_validate({"model": {"arch": "llama", **shape, **model}, "parallel": {"recompute": recompute}})
    net = Transformer(config)
    init_weights(net, config.model, 0)
    return net


def blocks_of(net: nn.Module) -> list[Block]:
    return [part for part in net.modules() if isinstance(part, Block)]


def offloaded(net: nn.Module, store: Any, takes_all: bool = True, min_bytes: int = 1024) -> Offloader:
    return Offloader(blocks_of(net), Mover(store), takes_all, min_bytes)


def batch(micro: int = 0, documents: bool = False) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(micro)
    tokens = torch.randint(0, 128, (BATCH, SEQ + 1), generator=draw)
    ids = (torch.arange(SEQ) // 23).to(torch.int32).expand(BATCH, SEQ).contiguous() if documents else None
    return tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, SEQ), torch.arange(BATCH) + micro, ids  # type: ignore[return-value]


def gradients(net: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return found


def run(net: nn.Module, micro_batches: int = 2, documents: bool = False) -> list[Tensor]:
    for micro in range(micro_batches):
        net(*batch(micro, documents)).backward()
    return gradients(net)


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(mine) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def store_of(kind: str, folder: Path, limit: int | None = None) -> Any:
    return DiskStore(folder, limit) if kind == "ssd" else HostStore(limit)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_without(model: str, dtype: torch.dtype, recompute: str, tmp_path: Path) -> None:
    for documents, kind in itertools.product((False, True), ("ssd", "cpu")):
        net = build(recompute, **MODELS[model]).to(dtype)
        expected = run(net, documents=documents)
        offload = offloaded(net, store_of(kind, tmp_path))
        assert same(run(net, documents=documents), expected)
        counts = offload.counts
        assert counts.written > 0 and counts.read + counts.forwarded > 0
        assert offload.mover.store.total > 0


def drained(net: nn.Module, offload: Offloader, *arguments: Any) -> Tensor:
    """The loss of a forward whose data is all out."""
    loss: Tensor = net(*arguments)
    scope = offload._scope
    while scope is not None:
        scope.settle()
        scope = scope.previous
    return loss


def test_everything_comes_back_from_the_disk_before_it_is_asked_for(tmp_path: Path) -> None:
    net = build()
    expected = run(net, 1)
    offload = offloaded(net, DiskStore(tmp_path))
    mover, asked, late = offload.mover, [], []

    def take(entry: Entry) -> Tensor:
        asked.append(entry.size)
        late.extend([] if entry.tensor is not None or entry.reading is not None else [entry.size])
        return inner(entry)

    inner, mover.take = mover.take, take  # type: ignore[method-assign]
    loss = drained(net, offload, *batch())
    assert offload._scope is not None and offload._scope.position == 3 and not offload._scope.entries  # the last block's
    loss.backward()
    assert asked and not late
    assert same(gradients(net), expected)
    assert offload.counts.forwarded == 0 and offload.counts.read == offload.counts.written > 0 and offload.counts.kept == 0


def test_micro_batches_in_flight_are_not_mixed_up(tmp_path: Path) -> None:
    net = build()
    expected = run(net, 3)
    offloaded(net, DiskStore(tmp_path))
    losses = [net(*batch(micro)) for micro in range(2)]
    losses[0].backward()
    losses.append(net(*batch(2)))
    losses[1].backward()
    losses[2].backward()
    assert same(gradients(net), expected)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_memory_is_given_up(recompute: str, tmp_path: Path) -> None:
    """Of six equal blocks the last stays: of what the blocks keep after forward, five sixths go, up to a few statistics."""

    def held(net: Transformer, offload: Offloader | None) -> tuple[int, Tensor]:
        with PeakOfTensors() as memory:
            loss = drained(net, offload, *batch()) if offload else net(*batch())
            gc.collect()
        return memory.now, loss

    net = build(recompute, layers=6, ffn_hidden_size=64)  # a small MLP, so that attention's inputs show
    whole, loss = held(net, None)
    loss.backward()
    small, _ = held(net, offloaded(net, DiskStore(tmp_path)))
    assert small < 0.35 * whole, (small, whole)


def test_a_storage_goes_once_and_weights_never(tmp_path: Path) -> None:
    net = build(layers=2)
    sent: list[Tensor] = []
    offload = offloaded(net, DiskStore(tmp_path), min_bytes=1)
    send = offload.mover.send
    offload.mover.send = lambda tensor: (sent.append(tensor), send(tensor))[1]  # type: ignore[method-assign]
    loss = net(*batch())
    places = [tensor.untyped_storage().data_ptr() for tensor in sent]  # alive, so that no address comes twice
    assert len(set(places)) == len(places) > 0 and offload.counts.shared > 0
    assert not {p.untyped_storage().data_ptr() for p in net.parameters()} & set(places)
    loss.backward()
    weight, mover = blocks_of(net)[0].mlp.up.weight, offload.mover
    for tensor, stays in ((weight, True), (weight.t(), True), (weight.detach()[1:], True), (weight * 1.0, False)):
        packed = offload._pack(Scope(0, None, mover, math.inf), list(net.parameters()), tensor)
        assert isinstance(packed, Kept) == stays and torch.equal(offload._unpack(packed), tensor)


def test_the_flat_buffer_of_weights_stays(tmp_path: Path) -> None:
    offload, flat = offloaded(build(layers=2), DiskStore(tmp_path), min_bytes=1), torch.zeros(300)
    scope, weight = Scope(0, None, offload.mover, math.inf), nn.Parameter(torch.zeros(1))
    for begin, stays in ((0, True), (100, True), (299, True), (None, False)):
        weight.data = torch.zeros(100) if begin is None else flat[begin:]  # as ZeRO does
        assert isinstance(offload._pack(scope, [weight], flat[100:200]), Kept) == stays


def test_forward_waits_for_the_disk_where_everything_goes(tmp_path: Path) -> None:
    class SlowStore(HostStore):
        def put(self, slot: Any, source: Tensor) -> None:
            time.sleep(0.01)
            super().put(slot, source)

    net, waiting = build(layers=6), []
    offload = offloaded(net, SlowStore(None))

    def enter(position: int) -> Scope:
        scope = inner(position)
        before, steps = scope, 0
        while before.previous is not None:
            before, steps = before.previous, steps + 1
            entries = [entry for reference in before.entries if (entry := reference()) is not None]
            waiting.extend([steps] if any(entry.writing is not None and not entry.writing.done() for entry in entries) else [])
        return scope

    inner, offload._enter = offload._enter, enter  # type: ignore[method-assign]
    net(*batch()).backward()
    assert waiting and max(waiting) <= 2


class GatedStore(HostStore):
    """Writes wait until the gate is opened."""

    def __init__(self) -> None:
        super().__init__(None)
        self.gate = threading.Event()

    def put(self, slot: Any, source: Tensor) -> None:
        assert self.gate.wait(60)
        super().put(slot, source)


def test_what_is_still_on_its_way_is_taken_from_memory() -> None:
    net, store = build(layers=3), GatedStore()
    expected = run(net, 1)
    offload = offloaded(net, store, takes_all=False)
    try:
        assert same(run(net, 1), expected)
    finally:
        store.gate.set()
    assert offload.counts.forwarded > 0 and offload.counts.read == offload.counts.written == 0


def test_a_tensor_wanted_on_its_way_does_not_leave() -> None:
    store = GatedStore()
    mover = Mover(store)
    entry = mover.send(torch.ones(1000))
    assert entry is not None
    mover.fetch(entry)
    store.gate.set()
    mover.settle(entry)
    assert torch.equal(mover.take(entry), torch.ones(1000)) and entry.is_original and mover.counts.written == 0


def test_a_graph_that_is_dropped_is_gone() -> None:
    """relu saves its own output: held as it is by its node it would never be freed."""
    net, seen = build(layers=2, arch="gpt", activation="relu"), []
    offload = offloaded(net, HostStore(0))  # all of it stays

    def pack(scope: Scope, parameters: list[nn.Parameter], tensor: Tensor) -> Kept | Moved:
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storage = tensor.untyped_storage()
        seen.extend([] if storage.data_ptr() in weights else [(tensor.shape, tensor.is_leaf, StorageWeakRef(storage))])
        return inner(scope, parameters, tensor)

    inner, offload._pack = offload._pack, pack  # type: ignore[method-assign]
    net(*batch())
    assert len(seen) > 5 and [found[:2] for found in seen if not found[2].expired()] == []


class FixedRate:
    """So many bytes a second, whatever happens."""

    def __init__(self, bytes_per_second: float):
        self.bytes_per_second = bytes_per_second

    def busy(self, size: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def test_the_measured_bandwidth_decides() -> None:
    """Marks are a second apart, so that from one block's backward to the next there is always one second."""
    net = build()
    expected = run(net, 1)
    offload = offloaded(net, HostStore(None), takes_all=False)
    mover, clock = offload.mover, itertools.count()
    mover.lane.mark = lambda: float(next(clock))  # type: ignore[method-assign]
    offered = []
    for out_rate, in_rate in ((20e3, 1e9), (1e9, 30e3), (1e9, 1e9)):
        mover.out_rate, mover.in_rate = FixedRate(out_rate), FixedRate(in_rate)  # type: ignore[assignment]
        assert same(run(net, 1), expected)
        assert same(run(net, 1), expected)  # planned with the rates above
        offered.append(list(offload.budgets))
        third = offload._scope.previous if offload._scope else None
        assert third is not None and third.position == 2 and third.sent <= third.budget <= third.offered
    assert offload.budgets[3] == math.inf  # the last block, which never moves
    slow_out, slow_in, fast = offered
    assert all(0 < amount <= 0.8 * 30e3 for amount in slow_in[:3])  # less by what this machine waited for its own copies
    assert sum(slow_out[:3]) < sum(fast[:3])
    assert len(set(fast[:3])) == 1 and fast[0] > 100_000  # all a block has


def test_nothing_has_a_name_and_slots_come_back(tmp_path: Path) -> None:
    (tmp_path / f"host-1-0{SUFFIX}").write_bytes(b"left by a process that was killed")
    (tmp_path / "mine.txt").write_text("not ours")
    net = build()
    offload = offloaded(net, DiskStore(tmp_path))
    for _ in range(2):
        run(net, 1)
    total = offload.mover.store.total
    run(net, 2)
    assert offload.mover.store.total == total
    blocks_of(net)[1].register_forward_hook(lambda module, inputs, out: out.register_hook(lambda gradient: 1 / 0) and None)
    with pytest.raises(ZeroDivisionError):
        net(*batch()).backward()  # ends in the middle
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_error_gives_back_what_was_out(tmp_path: Path) -> None:
    net = build()
    offload = offloaded(net, DiskStore(tmp_path))
    drained(net, offload, *batch())  # a graph nobody goes back through, dropped with its loss: no cycle waits for the collector
    store = offload.mover.store
    assert sum(slot.size for slot in store._returned) == store.total > 0


def test_a_limit_is_kept(tmp_path: Path) -> None:
    net = build()
    expected = run(net, 1)
    offload = offloaded(net, DiskStore(tmp_path, limit=200_000))
    assert same(run(net, 1), expected)
    assert 0 < offload.mover.store.total <= 200_000 and offload.counts.kept > 0


class FullDisk(DiskStore):
    """Has room for its first slot only."""

    def put(self, slot: Any, source: Tensor) -> None:
        if slot.place:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        super().put(slot, source)


def test_a_full_disk_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = build()
    expected = run(net)
    offload = offloaded(net, FullDisk(tmp_path))
    with caplog.at_level(logging.WARNING, logger="megastab"):
        assert same(run(net), expected)
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text and "nothing is lost" in caplog.text
    assert offload.counts.kept > offload.counts.written > 0


def train_and_die(folder: Path) -> None:
    net = build()
    offload = offloaded(net, DiskStore(folder))
    drained(net, offload, *batch())
    assert offload.counts.written > 0
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 0 died"):
        run_ranks(1, train_and_die, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["overwritten", "cut short"])
def test_damage_names_the_file(how: str, tmp_path: Path) -> None:
    net, store = build(), DiskStore(tmp_path)
    loss = drained(net, offloaded(net, store), *batch())
    if how == "cut short":
        os.ftruncate(store.descriptor, 4096)
        said = "bytes could be read"
    else:
        with open(f"/proc/self/fd/{store.descriptor}", "r+b") as file:
            file.seek(store.total // 2)
            file.write(b"\xff" * 4096)
        said = "not what was written"
    with pytest.raises(RuntimeError, match=f"{store.path}.*{said}"):
        loss.backward()


@pytest.mark.parametrize("where", ["kept", "on its way", "out"])
def test_a_change_in_place_is_noticed(where: str) -> None:
    store = GatedStore()
    net, held = build(layers=2), []
    offload = offloaded(net, store, takes_all=False, min_bytes=1 << 40 if where == "kept" else 1024)
    blocks_of(net)[0].mlp.register_forward_pre_hook(lambda module, inputs: held.append(inputs[0]))
    loss = net(*batch())
    with torch.no_grad():
        held[0].add_(1.0)
    if where == "out":
        store.gate.set()
        assert offload._scope is not None and offload._scope.previous is not None
        offload._scope.previous.settle()
    try:
        with pytest.raises(RuntimeError, match="changed in place"):
            loss.backward()
    finally:
        store.gate.set()


def test_a_change_while_it_is_written_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a damaged disk, though the bytes are not those that were summed."""
    mover, tensor, write = Mover(DiskStore(tmp_path)), torch.zeros(4096), os.pwritev

    def late(*arguments: Any) -> int:
        tensor.add_(1.0)
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", late)
    entry = mover.send(tensor)
    assert entry is not None
    mover.settle(entry)
    with pytest.raises(RuntimeError, match="changed in place"):
        mover.take(entry)


def test_memory_of_others_stays(tmp_path: Path) -> None:
    """It may begin anywhere, so that what comes back could not be viewed as elements."""
    offload = offloaded(build(layers=2), DiskStore(tmp_path), min_bytes=1)
    scope = Scope(0, None, offload.mover, math.inf)
    room = np.zeros(4096, np.uint8)
    begin = -room.ctypes.data % 64
    for shift, stays in ((0, False), (8, True)):
        packed = offload._pack(scope, [], torch.from_numpy(room[begin + shift :][:2048]))
        assert isinstance(packed, Kept) == stays


def test_evaluation_moves_nothing(tmp_path: Path) -> None:
    net = build()
    offload = offloaded(net, DiskStore(tmp_path))
    with torch.no_grad():
        net(*batch())
    net.eval()
    net(*batch()).backward()
    assert offload.mover.store.total == 0


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    from megastab.config.errors import UserError

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"activation_offload\.folder = .*file.* cannot be used"):
        DiskStore(tmp_path / "file")
