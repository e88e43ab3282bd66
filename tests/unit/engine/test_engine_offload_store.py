"""What offloaded activations lie in, how much of them goes, and what the config refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megastab.config.schema_offload import ActivationOffloadConfig
from megastab.engine.offload import offload_activations
from megastab.engine.offload_amount import SHARE, Rate, Seen, amounts
from megastab.engine.offload_disk import CHUNK, DiskStore
from megastab.engine.offload_store import ALIGNMENT, HostStore, Store, room_for


def test_rooms_are_few_and_little_above_what_they_hold() -> None:
    sizes = [*range(1, 3 * ALIGNMENT, 7), *range(1 << 20, 1 << 22, 4099)]
    rooms = {size: room_for(size) for size in sizes}
    assert all(room >= size and room % ALIGNMENT == 0 for size, room in rooms.items())
    assert all(room <= size * 1.125 + 1 for size, room in rooms.items() if size >= 1 << 20)
    assert len({room for size, room in rooms.items() if size >= 1 << 20}) <= 2 * 8 + 1


class StagedStore(DiskStore):
    """Through a buffer, as an accelerator's bytes go."""

    def _is_direct(self, device: torch.device) -> bool:
        return False


@pytest.mark.parametrize("kind", ["ssd", "staged", "cpu"])
@pytest.mark.parametrize("size", [1, 4095, 4096, CHUNK, CHUNK + 1, 2 * CHUNK + 12345])
def test_what_comes_back_is_what_went(kind: str, size: int, tmp_path: Path) -> None:
    store: Store = {"ssd": DiskStore, "staged": StagedStore}[kind](tmp_path) if kind != "cpu" else HostStore(None)
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    slots = [store.allocate(size) for _ in sent]
    for slot, tensor in zip(slots, sent, strict=True):
        assert slot is not None
        store.put(slot, tensor)
    for slot, tensor in reversed(list(zip(slots, sent, strict=True))):
        assert slot is not None
        found = store.target(slot, size, tensor.device)
        store.get(slot, found)
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("phase", [0, 64, 1088, 4032])
@pytest.mark.parametrize("size", [1, 100, 4096, 9000, CHUNK + 5000])
def test_the_disk_has_the_tensors_own_pages(size: int, phase: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a whole page is copied on its way out or back, at whatever address the tensor begins."""
    store, asked = DiskStore(tmp_path), dict.fromkeys(("pwritev", "preadv"), 0)

    def count(name: str, parts: list[memoryview], place: int, inner: Callable[..., int]) -> int:
        asked[name] += sum(len(part) for part in parts if np.may_share_memory(np.asarray(part), memory[name].numpy()))
        return inner(store.descriptor, parts, place)

    for name in asked:
        inner = getattr(os, name)
        monkeypatch.setattr(os, name, lambda _, parts, place, name=name, inner=inner: count(name, parts, place, inner))
    room = torch.randint(0, 256, (size + 2 * ALIGNMENT,), dtype=torch.uint8)
    begin = (phase - room.data_ptr()) % ALIGNMENT
    source, slot = room[begin : begin + size], store.allocate(size)
    assert slot is not None
    memory = {"pwritev": source}
    store.put(slot, source)
    memory["preadv"] = store.target(slot, size, source.device)
    assert memory["preadv"].data_ptr() % ALIGNMENT == phase
    store.get(slot, memory["preadv"])
    assert torch.equal(memory["preadv"], source)
    pages = max(0, (phase + size) // ALIGNMENT - -(-phase // ALIGNMENT))
    assert asked == {"pwritev": pages * ALIGNMENT, "preadv": pages * ALIGNMENT}


@pytest.mark.parametrize("kind", [DiskStore, StagedStore])
def test_a_sector_that_was_not_written_is_noticed(kind: type[DiskStore], tmp_path: Path) -> None:
    size = 3 * ALIGNMENT
    store, room = kind(tmp_path), torch.randint(1, 256, (size + ALIGNMENT,), dtype=torch.uint8)
    source, slot = room[(-room.data_ptr()) % ALIGNMENT :][:size], store.allocate(size)
    assert slot is not None
    stale = torch.randint(1, 256, (512,), dtype=torch.uint8).numpy().tobytes()
    store.put(slot, source)
    with open(f"/proc/self/fd/{store.descriptor}", "r+b") as file:
        whole = file.read()
        written = source.numpy().tobytes()
        begin = whole.index(written)
        for sector in range(begin, begin + size, 512):
            os.pwrite(file.fileno(), stale, sector)
            with pytest.raises(RuntimeError, match="what was read is not what was written"):
                store.get(slot, store.target(slot, size, source.device))
            os.pwrite(file.fileno(), whole[sector : sector + 512], sector)
    store.get(slot, store.target(slot, size, source.device))


def test_the_disk_is_written_past_the_page_cache(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with open(f"/proc/self/fdinfo/{store.descriptor}") as file:
        flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags"))
    assert flags & os.O_DIRECT


def test_slots_are_used_again_and_the_limit_holds() -> None:
    store = HostStore(3 * ALIGNMENT)
    first, second, third = (store.allocate(4000) for _ in range(3))
    assert first and second and third and store.allocate(1) is None
    store.free(second)
    assert store.allocate(4096) is second and store.total == 3 * ALIGNMENT


def block(saved: float, needed: float, begun: float, size: int = 1000, waited: float = 0.0) -> Seen:
    return Seen(saved, needed, begun, waited, size)


CASES: dict[str, tuple[list[Seen], float, float, list[int]]] = {
    "all of it fits": ([block(1, 9, 10), block(2, 8, 9)], 1e6, 1e6, [1000, 1000]),
    "writing is too slow": ([block(1, 3, 10)], 100.0, 1e6, [int(SHARE * 200)]),
    "reading is too slow": ([block(1, 9, 10)], 1e6, 100.0, [int(SHARE * 100)]),
    "time spent waiting for data is none to read in": ([block(1, 9, 11, waited=1.0)], 1e6, 100.0, [int(SHARE * 100)]),
    "a write waits for the one before": ([block(1, 20, 21), block(2, 13, 14)], 100.0, 1e6, [1000, int(SHARE * 200)]),
    "no time at all": ([block(1, 1, 1)], 1e6, 1e6, [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_as_much_goes_as_is_back_in_time(name: str) -> None:
    seen, out_rate, in_rate, expected = CASES[name]
    assert amounts(seen, out_rate, in_rate) == expected


def test_a_rate_counts_the_time_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    from megastab.engine import offload_amount

    now = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr(offload_amount, "MEMORY", 1.0)
    monkeypatch.setattr(offload_amount.time, "perf_counter", lambda: next(now))
    rate = Rate()
    assert rate.bytes_per_second == math.inf
    with rate.busy(100):  # 0 to 2
        pass
    with rate.busy(200):  # 10 to 13
        pass
    assert rate.bytes_per_second == 300 / 5


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "ssd"}, "set folder to a directory on a local disk"),
        ({"kind": "cpu", "folder": "/x"}, 'folder = "/x" is not read with kind = "cpu"'),
        ({"folder": "/x"}, 'is not read with kind = "none"'),
        ({"kind": "nvme", "folder": "/x"}, "'none', 'cpu' or 'ssd'"),
        ({"kind": "cpu", "max_gb": 0}, "greater than 0"),
    ],
)
def test_a_wrong_section_says_what_to_write(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ActivationOffloadConfig.model_validate(section)


def test_nothing_asked_nothing_done() -> None:
    assert offload_activations(torch.nn.Linear(1, 1), ActivationOffloadConfig()) is None
