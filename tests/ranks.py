"""Fresh processes as ranks: ``run_ranks(world, function, *args)`` returns every rank's result, or raises the first rank's traceback.

The fork server has imported torch, deepspeed and megatron.core once, so a rank starts in a fraction of a second; each call has its own
processes, port and hard time-out, and nothing outlives it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "deepspeed", "megatron.core.hyper_comm_grid", "megatron.core.datasets.indexed_dataset", "tests.preload"]


class RankFailed(AssertionError):
    """A rank raised, died or hung."""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, world: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    try:
        from megastab.engine.launch import start_job
        from megastab.parallel import collectives

        start_job()
        result = function(*args)
        collectives.leave()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # gloo's threads can abort a normal exit after a peer has died


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``function(*args)`` on ``world`` ranks of one job."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    processes, pipes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(set(range(len(pipes))) - set(results))} did not finish within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                is_ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if not is_ok:
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


@dataclass(frozen=True)
class Job:
    """A job under way whose ranks end as they will: each by its own exit code, none because another did."""

    processes: list[BaseProcess]
    log: Path
    """Both streams of all ranks."""

    def codes(self, timeout: float = 120.0) -> list[int | None]:
        """Exit codes by rank (negative: the signal that killed it); None for a rank that had to be killed here, in the end."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        self.end()
        return found

    def end(self) -> None:
        """Kill what still lives."""
        for process in self.processes:
            process.kill()
            process.join()


def _job_rank(rank: int, world: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    from megastab.engine.launch import run_job

    code = run_job(lambda: function(*args))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_job(world: int, log: Path, function: Callable[..., Any], *args: Any) -> Job:
    """Start ``function(*args)`` on ``world`` ranks as a launcher without mercy would: it ends nobody."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = _free_port()
    ranks = [context.Process(target=_job_rank, args=(rank, world, port, log, function, args), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    return Job(list(ranks), log)
