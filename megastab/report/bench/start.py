"""Figures of starting: ``import megastab``, help, dry run, and the launcher to the end of the first step. Whole processes, wall time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from megastab.data.index_file import write_index
from megastab.report.bench.cases import Options, Spec
from megastab.report.bench.jobs import ROOT, Failed, environment, free_port, last_words
from megastab.report.bench.rows import Row

IMPORT_BOUND, HELP_BOUND, LAUNCH_BOUND = 0.3, 1.0, 25.0
LAUNCH_LIMIT_SECONDS = 180
PRETRAIN = str(ROOT / "megastab" / "pretrain.py")


def start(options: Options) -> Iterator[Row]:
    """From a command to an answer."""
    config = str(ROOT / "configs" / "llama_7b.json")
    yield _commands("import megastab", ["-c", "import megastab"], options, IMPORT_BOUND)
    yield _commands("pretrain.py --help", [PRETRAIN, "--help"], options, HELP_BOUND)
    yield _commands(
        "--dry-run of llama_7b on 64 ranks", [PRETRAIN, "--deepspeed_config", config, "--dry-run", "--world-size", "64"], options
    )
    yield _launches(options)


def _commands(case: str, arguments: Sequence[str], options: Options, bound: float | None = None) -> Row:
    seconds = []
    for _ in range(1 + options.repeats):  # the first fills the file cache
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], env=environment(options.threads), capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
        if done.returncode:
            return Row("start", case, None, detail=last_words(done.stdout + done.stderr))
    return _row(case, seconds[1:], bound)


def _row(case: str, seconds: list[float], bound: float | None) -> Row:
    return Row("start", case, median(seconds), "s", bound, False, f"{len(seconds)} runs, with the interpreter", {"seconds": seconds})


def _launches(options: Options) -> Row:
    case = "two ranks to the end of step 1"
    try:
        return _row(case, [first_step(options) for _ in range(options.repeats)], LAUNCH_BOUND)
    except Failed as error:
        return Row("start", case, None, detail=str(error))


def first_step(options: Options) -> float:
    """Seconds from calling the launcher to the first step's line in ``metrics.jsonl``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens", vocab_size=4096)
        source = Spec("ours", tensor=2, data=str(folder / "tokens")).source()
        source["megastab"]["run"] = {"total_steps": 1, "dir": str(folder / "run")}
        (folder / "config.json").write_text(json.dumps(source))
        return _until_written(_command(folder / "config.json"), folder / "run" / "metrics.jsonl", options)


def _command(config: Path) -> list[str]:
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", "2", "--master_port", free_port(), PRETRAIN, "--deepspeed_config", str(config)]


def _until_written(command: list[str], path: Path, options: Options) -> float:
    log = path.parents[1] / "log"
    with open(log, "w") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment(max(1, options.threads // 2)), stdout=output, stderr=subprocess.STDOUT)
        try:
            while not (path.exists() and path.stat().st_size):
                if process.poll() is not None or time.perf_counter() - began > LAUNCH_LIMIT_SECONDS:
                    raise Failed(last_words(log.read_text()))
                time.sleep(0.01)
            seconds = time.perf_counter() - began
            process.wait(timeout=LAUNCH_LIMIT_SECONDS)  # it saves and leaves by itself: nothing is orphaned
        finally:
            process.terminate()  # the launcher ends its ranks
            process.wait()
    return seconds


def write_tokens(prefix: Path, vocab_size: int, num_documents: int = 64, length: int = 2048) -> None:
    """A dataset of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_documents * length, dtype=np.uint16)
    tokens.tofile(f"{prefix}.bin")
    write_index(prefix.with_suffix(".idx"), np.full(num_documents, length, np.int32), np.dtype(np.uint16))
