"""How long this process stands in collectives: what is left of a step's time is its own.

All ranks take a step together, so its wall time is the same everywhere; a slow rank shows in that it waits less than its peers do.
Counted are the calls that may wait (``MAY_WAIT``) and the waits for those that return at once, on whatever they are called: see
:class:`Counted`. Transfer counts as waiting, which is why a slow link does not show. Nothing is counted outside :meth:`Waiting.begin`
to :meth:`Waiting.end`, nor in threads beside the step, and a wait inside another counts once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

from deepspeed.accelerator import get_accelerator

Span = tuple[Any, Any]  # two marks of one clock

MAY_WAIT = frozenset(
    (
        *("all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
        *("all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
        *("all_to_all", "all_to_all_single", "broadcast", "broadcast_object_list", "gather", "scatter"),
        *("send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "monitored_barrier"),
    )
)
"""Names, in ``torch.distributed`` and in DeepSpeed's backend alike."""


class Clock(Protocol):
    """Tells two moments apart in the time of whoever does the work."""

    def start(self) -> None:
        """A step begins."""

    def mark(self) -> Any:
        """This moment; None where it is not the step's own time that passes."""

    def seconds(self, spans: Sequence[Span]) -> float | None:
        """The length of all ``spans`` together; None as long as they are not over."""


class HostClock:
    """Where a call returns when it is done, as on the CPU: gloo blocks the thread that calls."""

    def start(self) -> None:
        """Nothing to prepare."""

    def mark(self) -> float:
        """Now."""
        return perf_counter()

    def seconds(self, spans: Sequence[Span]) -> float:
        """What passed on the wall."""
        return sum(ended - began for began, ended in spans)


class StreamClock:
    """Where a call returns at once and the stream waits: timing events before and after it on the step's stream.

    Nothing is synchronised for it: events are read when the device has passed them, a step later at the latest. Calls on another stream
    do not hold up the step by themselves; whoever makes the step's stream wait for that one has to be counted (``wrappers.waiting``).
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._free: list[Any] = []  # events are made once and used again

    def start(self) -> None:
        """The stream that is current now is the step's."""
        self._stream = get_accelerator().current_stream()

    def mark(self) -> Any:
        """An event on the step's stream; None on another."""
        if get_accelerator().current_stream() != self._stream:
            return None
        event = self._free.pop() if self._free else get_accelerator().Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: Sequence[Span]) -> float | None:
        """What passed on the device; None while it has not come to the last of them."""
        if not all(ended.query() for _, ended in spans):
            return None
        total = sum(began.elapsed_time(ended) for began, ended in spans) / 1e3  # events tell milliseconds
        self._free += [event for span in spans for event in span]
        return float(total)


def clock_of_device() -> Clock:
    """The clock of this process's device."""
    accelerator = get_accelerator()
    return HostClock() if accelerator.is_synchronized_device() or accelerator.use_host_timers() else StreamClock()


class Waiting:
    """What this process waits for, step by step.

    Args:
        clock: of the device the work is done on; None for this process's.
    """

    def __init__(self, clock: Clock | None = None):
        self.clock = clock_of_device() if clock is None else clock
        self._spans: list[Span] = []
        self._is_on = self._is_inside = False
        self._thread = 0

    def begin(self) -> None:
        """A step begins: count from here on."""
        self.clock.start()
        self._spans, self._is_on, self._thread = [], True, threading.get_ident()

    def end(self) -> list[Span]:
        """The step is over: where it waited, for the clock to read."""
        spans, self._spans, self._is_on = self._spans, [], False
        return spans

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time counted, and that of waiting for what it returns."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self._is_on or self._is_inside or self._is_beside():
                return call(*args, **kwargs)
            return self._held(self._timed(call, args, kwargs))

        return counted

    def _is_beside(self) -> bool:
        """Whether this is a thread somebody started beside the step; those in which autograd runs backward are not Python's."""
        return threading.get_ident() != self._thread and not isinstance(threading.current_thread(), threading._DummyThread)

    def _timed(self, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        began = self.clock.mark()
        if began is None:
            return call(*args, **kwargs)
        self._is_inside = True
        try:
            return call(*args, **kwargs)
        finally:
            self._is_inside = False
            if (ended := self.clock.mark()) is not None:
                self._spans.append((began, ended))

    def _held(self, result: Any) -> Any:
        if isinstance(result, list):
            return [self._held(each) for each in result]
        return CountedWork(result, self) if hasattr(result, "wait") else result


class CountedWork:
    """An asynchronous collective under way; everything but the counting is its own."""

    def __init__(self, work: Any, waiting: Waiting):
        self._work = work
        self.wait = waiting.counting(work.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Counted:
    """``calls``, a module or an object with collectives, whose every call that may wait is counted; everything else is its own."""

    def __init__(self, calls: Any, waiting: Waiting):
        self.calls, self._waiting = calls, waiting

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.calls, name)
        if name in MAY_WAIT and callable(value):
            value = self.__dict__[name] = self._waiting.counting(value)  # made once: the next look finds it without coming here
        return value
