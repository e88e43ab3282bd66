"""Ranks as threads of one process: what mpi4py does in a real run, for tests of how work is cut and merged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any


class ThreadRank:
    """One of them."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any], boxes: list[SimpleQueue[Any]]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board, self._boxes, self._progress = barrier, board, boxes, boxes[-1]

    def of_all(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self.meet()
        values = list(self._board)
        self.meet()
        return values

    def from_first(self, make: Callable[[], Any]) -> Any:
        return self.of_all(make() if self.rank == 0 else None)[0]

    def meet(self) -> None:
        self._barrier.wait(60)

    def tell(self, amount: int | None) -> None:
        if self.rank:
            self._progress.put(amount)

    def heard(self) -> list[int | None]:
        return [self._progress.get() for _ in range(self._progress.qsize())]

    def send(self, value: Any) -> None:
        self._boxes[self.rank].put(value)

    def receive(self, rank: int) -> Any:
        return self._boxes[rank].get(timeout=60)


def on_ranks(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
    """What ``work`` returns on each rank; an error of one ends all, as MPI's Abort does."""
    barrier, board = threading.Barrier(size), [None] * size
    boxes: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(size + 1)]
    errors: list[Exception] = []

    def run(rank: int) -> Any:
        try:
            return work(ThreadRank(rank, size, barrier, board, boxes))
        except Exception as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    if errors:
        raise errors[0]
    return results
