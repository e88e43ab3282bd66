"""What the experiments share: the data, one run in a process of its own, and what is read from its folder.

Everything lands in ``data/experiments`` and ``runs/experiments`` of the checkout. A run whose folder is complete is not run again, so
that an interrupted experiment is taken up by the same command.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # a checkout that is not installed

from megastab.report.history import read_history  # noqa: E402

HERE, CONFIG = Path(__file__).resolve().parent, "docs/experiments/llama_2m.json"
DATA, RUNS = Path("data/experiments"), Path("runs/experiments")  # relative to ROOT, where everything is run
BATCH, SEQ, VOCAB = 4, 128, 2048  # as in CONFIG
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Run:
    """One training run: a folder below ``runs/experiments`` and what differs from ``llama_2m.json``."""

    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Absolute."""
        return ROOT / RUNS / self.name

    @property
    def command(self) -> list[str]:
        """As typed in the root of the checkout."""
        run = (f"megastab.run.dir={RUNS / self.name}", *self.overrides)
        return ["python", "megastab/pretrain.py", "--deepspeed_config", CONFIG, *run]


def environment() -> dict[str, str]:
    """One thread, no accelerator, and this checkout before any installed one."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


def prepare_data() -> None:
    """The quick start's corpus with a vocabulary of 2048, made once."""
    text, prefix = DATA / "text.jsonl", DATA / "text"
    steps = {
        text: ["-m", "megastab.data.stdlib_corpus", text],
        DATA / "text.model": ["tools/train_tokenizer.py", "--output", prefix, "--vocab-size", VOCAB, text],
        DATA / "text_valid.idx": [
            *("tools/prepare_data.py", "--tokenizer", DATA / "text.model", "--output", prefix, "--workers", 1),
            *("--valid-fraction", 0.05, text),
        ],
    }
    for made, arguments in steps.items():
        if not (ROOT / made).exists():
            subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), check=True)


def run_all(runs: Sequence[Run], jobs: int = 1, measure: Callable[[Path], Any] | None = None) -> None:
    """Every run that is not complete, ``jobs`` at a time; ``measure`` sees its folder before the checkpoint is thrown away."""
    wanted = {run.name: run for run in runs}  # a run may be asked for twice
    todo = [run for run in wanted.values() if not (run.folder / OUTCOME).exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} of them there already", flush=True)

    def one(numbered: tuple[int, Run]) -> None:
        number, run = numbered
        outcome = _run(run, measure)
        print(f"[{number}/{len(todo)}] {run.name}: {outcome['cpu_seconds']:.0f} s CPU, exit {outcome['code']}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, enumerate(todo, 1)))


def _run(run: Run, measure: Callable[[Path], Any] | None) -> dict[str, Any]:
    """Train in a process of its own, and keep what it cost."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    if run.folder.exists():
        shutil.rmtree(run.folder)  # what an interrupted run left
    with open(f"{run.folder}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *run.command[1:]], cwd=ROOT, env=environment(), stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)  # the processor time of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
    outcome: dict[str, Any] = {"code": process.returncode, "cpu_seconds": used.ru_utime + used.ru_stime, "command": shlex.join(run.command)}
    if not (run.folder / "metrics.jsonl").exists():
        raise SystemExit(f"{run.name} took no step: see {run.folder}.log")
    if measure is not None and process.returncode == 0:
        outcome["measured"] = measure(run.folder)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    (run.folder / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")
    return outcome


def outcome_of(run: Run) -> dict[str, Any]:
    """What the run cost, and what was measured at its end."""
    outcome: dict[str, Any] = json.loads((run.folder / OUTCOME).read_text())
    return outcome


def valid_loss(run: Run) -> float:
    """At the last step; infinite where the run ended before it."""
    values = read_history(run.folder).evaluated("valid_loss")[1]
    return values[-1] if values else math.inf


def measured_outcome(run: Run) -> dict[str, Any]:
    """The outcome of a run that ended well and was looked at; otherwise the script ends and says what to do."""
    outcome = outcome_of(run)
    if "measured" not in outcome:
        raise SystemExit(f"{run.name} did not end well (exit {outcome['code']}): see {run.folder}.log, delete its folder, run again")
    return outcome


def shortened(value: Any) -> Any:
    """Floats to five digits, for a page's JSON."""
    if isinstance(value, dict):
        return {key: shortened(x) for key, x in value.items()}
    if isinstance(value, list):
        return [shortened(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def cpu_minutes(prefix: str) -> float:
    """Processor time of every run below a folder of ``runs/experiments``, probes and repetitions included."""
    spent = [json.loads(path.read_text())["cpu_seconds"] for path in (ROOT / RUNS / prefix).rglob(OUTCOME)]
    return sum(spent) / 60


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_into(page: Path, mark: str, text: str) -> None:
    """Replace what stands between ``<!-- mark -->`` and ``<!-- end of mark -->`` of a page; a page without them is left alone."""
    start, stop = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    whole = page.read_text() if page.exists() else ""
    if start in whole and stop in whole:
        before, after = whole.split(start)[0], whole.split(stop)[1]
        page.write_text(f"{before}{start}\n{text}\n{stop}{after}")
