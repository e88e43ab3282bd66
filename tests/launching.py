"""Runs the product as a user does: the deepspeed launcher, two ranks, a tiny model on real text; or the same ranks without a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.ranks import TIMEOUT, start_pretrain

ROOT = Path(__file__).parent.parent
LAUNCHER = Path(sys.executable).parent / "deepspeed"


@dataclass(frozen=True)
class Finished:
    """A launch that ended."""

    code: int
    text: str


def environment() -> dict[str, str]:
    """The machine as a plain CPU box."""
    path = f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


def command(*arguments: str, ranks: int = 2, script: str = "megastab/pretrain.py") -> list[str]:
    """The launcher's command line, on a port of its own."""
    return [str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(free_port()), script, *arguments]


def launch(*arguments: str, ranks: int = 2, script: str = "megastab/pretrain.py", timeout: float = TIMEOUT) -> Finished:
    """Run to the end; what it printed, both streams in order."""
    done = subprocess.run(
        command(*arguments, ranks=ranks, script=script),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Finished(done.returncode, done.stdout)


def pretrain(*arguments: str, ranks: int = 2, plant: Callable[[], None] | None = None, timeout: float = TIMEOUT) -> Finished:
    """As :func:`launch` runs it, by forked ranks: no launcher, and none of the imports, which are most of a launch's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        job = start_pretrain(ranks, Path(folder) / "log", arguments, plant)
        code = job.first_failure(timeout)
        return Finished(code, job.log.read_text())


def tool(*arguments: str, timeout: float = TIMEOUT) -> Finished:
    """Run ``python arguments`` from the root."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout + done.stderr)


def records(run: Path) -> list[dict[str, Any]]:
    """The StepRecords of a run folder, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, norm, lr) of every step."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(run)]
