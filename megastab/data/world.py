"""The processes that prepare data together: one alone, or the ranks of an ``mpirun``, which talk through mpi4py.

Neither torch nor its process groups: preparing data needs no torch. A rank that waits for others sleeps between looks, because MPI's own
waiting keeps a core busy that a worker could use.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from megastab.config.errors import UserError
from megastab.config.ranks import DIALECTS

T = TypeVar("T")
_NAP_SECONDS = 0.01
_PROGRESS, _CONTENT = 1, 2  # message tags


class World(Protocol):
    """What preparing asks of its ranks. Every rank calls ``from_first``, ``of_all`` and ``meet``, in the same order."""

    rank: int
    size: int

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, where alone it runs."""

    def of_all(self, value: T) -> list[T]:
        """Every rank's value, by rank."""

    def meet(self) -> None:
        """Wait until every rank is here."""

    def tell(self, amount: int | None) -> None:
        """Send rank 0 a number of bytes done, or None where this rank has no more to do."""

    def heard(self) -> list[int | None]:
        """On rank 0: what the others told since the last call."""

    def send(self, value: Any) -> None:
        """Send something large to rank 0, which takes it with ``receive``."""

    def receive(self, rank: int) -> Any:
        """On rank 0: the next thing that ``rank`` sent."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def from_first(self, make: Callable[[], T]) -> T:
        """Its own."""
        return make()

    def of_all(self, value: T) -> list[T]:
        """Its own."""
        return [value]

    def meet(self) -> None:
        """Nobody to wait for."""

    def tell(self, amount: int | None) -> None:
        """Nobody to tell."""

    def heard(self) -> list[int | None]:
        """Nothing."""
        return []

    def send(self, value: Any) -> None:
        """Never needed."""
        raise NotImplementedError

    def receive(self, rank: int) -> Any:
        """Never needed."""
        raise NotImplementedError


ALONE = Alone()


class MpiRanks:
    """The ranks of an MPI communicator."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def from_first(self, make: Callable[[], T]) -> T:
        """Broadcast over all ranks."""
        mine = make() if self.rank == 0 else None
        self.meet()
        value: T = self._comm.bcast(mine, root=0)
        return value

    def of_all(self, value: T) -> list[T]:
        """Gathered on all ranks."""
        self.meet()
        values: list[T] = self._comm.allgather(value)
        return values

    def meet(self) -> None:
        """A barrier that sleeps."""
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(_NAP_SECONDS)

    def tell(self, amount: int | None) -> None:
        """A few bytes, which MPI sends without waiting for the receiver."""
        if self.rank:
            self._comm.send(amount, dest=0, tag=_PROGRESS)

    def heard(self) -> list[int | None]:
        """What has arrived."""
        said = []
        while self._comm.iprobe(tag=_PROGRESS):
            said.append(self._comm.recv(tag=_PROGRESS))
        return said

    def send(self, value: Any) -> None:
        """Returns when rank 0 has it."""
        request = self._comm.isend(value, dest=0, tag=_CONTENT)
        while not request.test()[0]:
            time.sleep(_NAP_SECONDS)

    def receive(self, rank: int) -> Any:
        """Waits for it; one sender's values arrive in their order."""
        while not self._comm.iprobe(source=rank, tag=_CONTENT):
            time.sleep(_NAP_SECONDS)
        return self._comm.recv(source=rank, tag=_CONTENT)


def join() -> World:
    """The ranks that an MPI launcher started; alone where none did.

    Raises:
        UserError: mpi4py finds no MPI library, or this launcher's is another one.
    """
    names = [(d.rank, d.world) for d in DIALECTS if d.launcher != "torchrun" and d.rank in os.environ and d.world in os.environ]
    if not names or os.environ[names[0][1]] == "1":
        return ALONE
    said = tuple(os.environ[name] for name in names[0])
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"started as rank {said[0]} of {said[1]}, but mpi4py finds no MPI ({error}): {_FIX}") from None
    world = MpiRanks(MPI.COMM_WORLD)
    if said != (str(world.rank), str(world.size)):
        raise UserError(f"the launcher says rank {said[0]} of {said[1]}, mpi4py says {world.rank} of {world.size}: {_FIX}")
    return world


_FIX = "install mpi4py for the MPI of this launcher (Slurm: srun --mpi=pmix), or start one process"


@contextmanager
def joined() -> Iterator[World]:
    """The ranks of this run, for a command line: an error ends all of them, after its message.

    A rank that merely ended with a traceback would leave the others waiting for it, and itself in MPI's own clean-up.
    """
    world: World = ALONE
    try:
        world = join()
        yield world
    except BaseException as error:
        if not isinstance(world, MpiRanks):
            sys.exit(f"error: {error}") if isinstance(error, UserError) else None
            raise
        from mpi4py import MPI

        is_stop = isinstance(error, (SystemExit, KeyboardInterrupt))  # someone else says why
        if not is_stop:
            text = f"error: {error}" if isinstance(error, UserError) else traceback.format_exc()
            print(f"rank {world.rank} of {world.size} on {MPI.Get_processor_name()}: {text}", file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(1)


def default_workers() -> int:
    """Worker processes for this rank: an equal share of the host's cores, and no more than the launcher lets it use."""
    cores = os.cpu_count() or 1
    ranks_here = next((os.environ[d.local_size] for d in DIALECTS if d.launcher != "torchrun" and d.local_size in os.environ), "1")
    first = ranks_here.split("(")[0].split(",")[0]  # Slurm: 4(x2), the first host's
    if not first.isdecimal() or first in ("0", "1"):
        return cores
    return max(1, min(len(os.sched_getaffinity(0)), cores // int(first)))


def share_out(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions for each rank, largest first to whom has least so far; within a rank in the order of the input."""
    loads, shares = [0] * num_ranks, [[] for _ in range(num_ranks)]  # type: tuple[list[int], list[list[int]]]
    for position in sorted(range(len(sizes)), key=lambda position: -sizes[position]):
        rank = loads.index(min(loads))
        loads[rank] += max(sizes[position], 1)
        shares[rank].append(position)
    return [sorted(share) for share in shares]
