"""Parent side: a contestant's processes, which take a step when asked and sleep otherwise.

A request is a line on the child's standard input, a reply a line of JSON on its standard output; everything else it prints goes to a
log that is shown when it fails. A sleeping process waits in ``read`` and costs its neighbour nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megastab.report.bench.cases import Spec

ROOT = Path(__file__).resolve().parents[3]
_LOG_TAIL = 3


class Failed(RuntimeError):
    """A measurement could not be taken; the message is the child's last words."""


@dataclass(frozen=True)
class Reply:
    """One step of one job, as its first rank saw it."""

    seconds: list[float]
    """One per contestant in the process."""
    losses: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """The same in processor time of all threads, where it was taken."""
    communicating: float = 0.0
    """Seconds inside megastab's collectives, waiting included."""
    fetching: float = 0.0
    """Seconds spent on getting the batch; part of ``seconds``."""


def environment(threads: int, **more: str) -> dict[str, str]:
    """A child's environment: this checkout, a fixed number of threads, and the CPU unless the caller chose a device."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    device = os.environ.get("DS_ACCELERATOR", "cpu")
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": device, **more}


def free_port() -> str:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class Job:
    """A running contestant; leave the ``with`` block to end it."""

    def __init__(self, spec: Spec, threads: int, ranks: int = 1):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the job)
        port, command = free_port(), [sys.executable, "-m", "megastab.report.bench.child", spec.dump()]
        place = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                # Hugging Face's Trainer would take these for a launcher's and wrap the model in DDP.
                env=environment(threads, **({} if spec.who == "hugging_face" else {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})),
            )
            for rank in range(ranks)
        ]

    def __enter__(self) -> Job:
        try:
            self._replies()
        except Failed:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._end()

    def step(self) -> Reply:
        """One step of every contestant in the job."""
        return Reply(**self._ask("step"))

    def grown_bytes(self) -> float:
        """Peak memory less what was resident before the model was built."""
        return float(self._ask("memory"))

    def facts(self) -> dict[str, float]:
        """What ``offload`` tells of itself."""
        return dict(self._ask("facts"))

    def _ask(self, request: str) -> Any:
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure() from None
        return self._replies()[0]

    def _replies(self) -> list[Any]:
        lines = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise self._failure()
            lines.append(json.loads(line))
        return lines

    def _failure(self) -> Failed:
        self.log.seek(0)
        return Failed(last_words(self.log.read()))

    def _end(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()  # the child's signal to leave
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.log.close()


def last_words(log: str) -> str:
    """The end of what a failed process printed, on one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_TAIL:]) or "it printed nothing"
