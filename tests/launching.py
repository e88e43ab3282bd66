"""Runs the product as a user does: the deepspeed launcher, two ranks, a tiny model on real text."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    return [str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(random.randint(20000, 60000)), script, *arguments]


def launch(*arguments: str, ranks: int = 2, script: str = "megastab/pretrain.py", timeout: float = 120) -> Finished:
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


def tool(*arguments: str, timeout: float = 120) -> Finished:
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
