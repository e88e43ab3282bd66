"""The clock of waiting: what it counts, what it leaves alone, and that no collective of DeepSpeed's or ours goes by it."""

from __future__ import annotations

import _thread
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from megastab.parallel import waiting
from megastab.parallel.waiting import MAY_WAIT, Counted, HostClock, StreamClock, Waiting
from tests.ranks import run_ranks


class Turns:
    """Calls of which each takes a second of a clock that only they move, and that clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.using_mpi = False
        self.held: tuple[threading.Event, threading.Event] | None = None
        self.clock = Waiting(HostClock())
        self.counted: Any = Counted(self, self.clock)

    def waited(self) -> float:
        return HostClock().seconds(self.clock.end())

    def all_reduce(self, tensor: Any, async_op: bool = False) -> Any:
        self.now += 1.0
        return SimpleNamespace(wait=self._wait, is_completed=lambda: "asked") if async_op else None

    def batch_isend_irecv(self, ops: list[Any]) -> list[Any]:
        return [SimpleNamespace(wait=self._wait) for _ in ops]

    def all_gather_coalesced(self, *_: Any) -> None:
        if self.held is not None:
            inside, done = self.held
            inside.set()
            done.wait(60)
        self.counted.all_reduce(None)  # a collective inside a collective

    def recv(self, *_: Any) -> int:
        raise ConnectionError("lost")

    def get_rank(self) -> int:
        self.now += 100.0  # never waits for anybody
        return 3

    def _wait(self) -> None:
        self.now += 10.0


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    made = Turns()
    monkeypatch.setattr(waiting, "perf_counter", lambda: made.now)
    return made


def test_calls_and_waits_are_counted_and_nothing_else(turns: Turns) -> None:
    turns.clock.begin()
    work = turns.counted.all_reduce(None, async_op=True)
    assert turns.counted.get_rank() == 3 and turns.counted.using_mpi is False
    assert work.is_completed() == "asked"
    work.wait()
    assert turns.waited() == 11.0


def test_a_batch_of_works_is_counted_where_each_is_waited_for(turns: Turns) -> None:
    turns.clock.begin()
    for work in turns.counted.batch_isend_irecv([1, 2]):
        work.wait()
    assert turns.waited() == 20.0


def test_a_collective_inside_another_counts_once(turns: Turns) -> None:
    turns.clock.begin()
    turns.counted.all_gather_coalesced()
    assert turns.waited() == 1.0


def test_between_steps_nothing_is_counted(turns: Turns) -> None:
    turns.counted.all_reduce(None)
    turns.clock.begin()
    begun = turns.counted.all_reduce(None, async_op=True)
    assert turns.waited() == 1.0
    begun.wait()  # an evaluation may make thousands of these: none is kept
    assert turns.clock.end() == []
    turns.clock.begin()
    assert turns.waited() == 0.0


def test_a_collective_that_fails_leaves_the_clock_whole(turns: Turns) -> None:
    turns.clock.begin()
    with pytest.raises(ConnectionError):
        turns.counted.recv(None)
    turns.counted.all_reduce(None)
    assert turns.waited() == 1.0


def test_a_thread_beside_the_step_is_left_alone_and_autograds_is_not(turns: Turns) -> None:
    """The agreement on stopping goes round the ranks beside a step; backward on an accelerator is in threads that Python did not start."""
    inside, done = threading.Event(), threading.Event()

    def ask() -> None:
        turns.counted.all_gather_coalesced()  # a second, in which the step goes on

    turns.held = (inside, done)
    turns.clock.begin()
    beside = threading.Thread(target=ask)
    beside.start()
    inside.wait(60)
    turns.held = None
    turns.counted.all_reduce(None)
    done.set()
    beside.join(60)
    assert turns.waited() == 1.0, "the step's own collective, while the other was under way"

    turns.clock.begin()
    ended = threading.Event()
    _thread.start_new_thread(lambda: (turns.counted.all_reduce(None), ended.set()), ())
    assert ended.wait(60) and turns.waited() == 1.0


class Event:
    """A timing event on a device that is ``lag`` behind."""

    now, lag = 0.0, 5.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.now >= self.at + Event.lag

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def test_a_streams_waits_are_read_when_the_device_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(stream="main", Event=Event)
    monkeypatch.setattr(waiting, "get_accelerator", lambda: SimpleNamespace(current_stream=lambda: device.stream, Event=Event))
    Event.now, made = 0.0, Waiting(StreamClock())

    def reduce() -> None:
        Event.now += 1.0

    made.begin()
    made.counting(reduce)()
    device.stream = "side"
    made.counting(reduce)()  # holds up another stream
    device.stream = "main"
    made.counting(reduce)()
    spans = made.end()
    assert len(spans) == 2 and made.clock.seconds(spans) is None, "the device has not come there"
    Event.now += 5.0
    assert made.clock.seconds(spans) == 2.0
    held = {id(event) for span in spans for event in span}
    made.begin()
    made.counting(reduce)()
    assert {id(event) for event in made.end()[0]} <= held, "events are used again"


def test_every_call_of_deepspeeds_backend_is_counted_or_known_not_to_wait() -> None:
    from deepspeed.comm.torch import TorchBackend

    harmless = {
        *("destroy_process_group", "get_backend", "get_global_rank", "get_rank", "get_world_group", "get_world_size", "is_initialized"),
        *("get_all_gather_function", "get_reduce_scatter_function", "has_all_gather_into_tensor", "has_reduce_scatter_tensor"),
        *("enable_symm_mem_for_group", "init_device_mesh", "init_process_group", "new_group"),
    }
    public = {name for name, _ in inspect.getmembers(TorchBackend, inspect.isroutine) if not name.startswith("_")}
    assert public - MAY_WAIT == harmless
    assert public >= MAY_WAIT, "names that are not there any more"


def counted_collectives() -> dict[str, float]:
    """What rank 0 waits for a rank 1 that comes late, by who makes the collective."""
    import time

    import deepspeed
    import torch
    from deepspeed.comm import comm

    from megastab.parallel import collectives
    from megastab.parallel.grid import Grid
    from megastab.wrappers.waiting import count_waiting, stop_counting

    rank, group = collectives.world()[0], Grid.create(2).tp.group
    clock, x = Waiting(), torch.ones(4)
    before = comm.cdb, collectives.dist
    for _ in range(2):  # the second time in place of the first
        count_waiting(None, clock)
    assert comm.cdb.calls is before[0]

    def p2p() -> None:
        deepspeed.comm.recv(x, 1) if rank == 0 else deepspeed.comm.send(x, 0)

    calls = {
        "sum": lambda: collectives.sum_(x, group),
        "gather": lambda: collectives.wait(collectives.gather_rows(x, group, async_op=True)[1]),
        "exchange": lambda: collectives.arrived_rows(*collectives.exchange_rows(x, [2, 2], [2, 2], group), x.device),
        "objects": lambda: collectives.gather_objects(1),
        "doubles": lambda: collectives.gather_doubles([1.0, 2.0]),
        "barrier": collectives.barrier,
        "deepspeed": lambda: deepspeed.comm.all_reduce(x),
        "deepspeed handle": lambda: deepspeed.comm.all_reduce(x, async_op=True).wait(),
        "deepspeed p2p": p2p,
    }
    found = {}
    for name, call in calls.items():
        collectives.barrier()
        clock.begin()
        time.sleep(0.5 * rank)
        call()
        found[name] = clock.clock.seconds(clock.end())
    stop_counting()
    assert (comm.cdb, collectives.dist) == before
    return found  # type: ignore[return-value]


def test_the_rank_in_time_waits_for_the_late_one() -> None:
    in_time, late = run_ranks(2, counted_collectives)
    # Half a second late; a loaded machine may let the ranks leave the barrier before it a little apart.
    assert all(seconds > max(0.2, late[name]) for name, seconds in in_time.items()), (in_time, late)
