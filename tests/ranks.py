"""Fresh processes as ranks: ``run_ranks(world, function, *args)`` returns every rank's result, or raises the first rank's traceback.

The fork server has imported torch, deepspeed and megatron.core once, so a rank starts in a fraction of a second; each call has its own
processes, port and hard time-out, and nothing outlives it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ports import free_port

# What ranks import anyway, most of it when an engine is built: half a second of processor time each, if it is not here.
PRELOAD = [
    *("torch", "pytest", "deepspeed", "megatron.core.hyper_comm_grid", "megatron.core.datasets.indexed_dataset"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3", "torch.profiler._cupti_monitor"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "einops._torch_specific", "torch._subclasses.schema_check_mode"),
    *("megastab.pretrain", "megastab.engine.trainer", "megastab.engine.library", "tests.jobs", "tests.preload"),
]
TIMEOUT = 300.0  # of jobs that take some seconds alone: other workers run theirs on the same cores
LAUNCHER_SECONDS = 1.0  # DeepSpeed's looks so often whether a rank has failed


class RankFailed(AssertionError):
    """A rank raised, died or hung."""


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


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run ``function(*args)`` on ``world`` ranks of one job."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
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

    def codes(self, timeout: float = TIMEOUT) -> list[int | None]:
        """Exit codes by rank (negative: the signal that killed it); None for a rank that had to be killed here, in the end."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        found = [process.exitcode for process in self.processes]
        self.end()
        return found

    def first_failure(self, timeout: float) -> int:
        """The code of the rank that fails first, after which a launcher ends the others; 0 where none does."""
        waiting, deadline = {process.sentinel: process for process in self.processes}, time.monotonic() + timeout
        try:
            while waiting:
                ended = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                if not ended:
                    raise RankFailed(f"the job did not end within {timeout} s:\n{self.log.read_text()}")
                codes = [waiting.pop(sentinel).exitcode for sentinel in ended]
                if any(codes):
                    for process in self.processes:
                        process.join(LAUNCHER_SECONDS)
                    return next(code for code in codes if code)
            return 0
        finally:
            self.end()

    def end(self) -> None:
        """Kill what still lives."""
        for process in self.processes:
            process.kill()
            process.join()


def _become(rank: int, world: int, port: int, log: Path) -> None:
    """What a launcher sets, and both streams into ``log``."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _job_rank(rank: int, world: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _become(rank, world, port, log)
    from megastab.engine.launch import run_job

    _leave(run_job(lambda: function(*args)))


def _pretrain_rank(rank: int, world: int, port: int, log: Path, arguments: tuple[str, ...], plant: Callable[[], None] | None) -> None:
    _become(rank, world, port, log)
    from megastab.pretrain import main

    if plant is not None:
        plant()
    _leave(main(arguments))


def start_job(world: int, log: Path, function: Callable[..., Any], *args: Any) -> Job:
    """Start ``function(*args)`` on ``world`` ranks as a launcher without mercy would: it ends nobody."""
    return _start(_job_rank, world, log, function, args)


def start_pretrain(world: int, log: Path, arguments: tuple[str, ...], plant: Callable[[], None] | None = None) -> Job:
    """Start ``pretrain.py arguments`` on ``world`` ranks, after ``plant()`` on each; nobody is ended here either."""
    return _start(_pretrain_rank, world, log, arguments, plant)


def _start(target: Callable[..., None], world: int, log: Path, *args: Any) -> Job:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    ranks = [context.Process(target=target, args=(rank, world, port, log, *args), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    return Job(list(ranks), log)
