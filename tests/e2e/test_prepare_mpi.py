"""``mpirun`` before the two data tools: one process's files; a killed rank's work is kept; a failing rank says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zstandard

from megastab.data.prepare import prepare
from megastab.data.stdlib_corpus import modules
from megastab.data.tokenizer_training import train_tokenizer
from tests.e2e.test_launchers import AS_ROOT
from tests.launching import ROOT, environment

VOCAB, SAMPLE_BYTES = 500, 300_000


def mpirun(ranks: int, *command: str) -> list[str]:
    return [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable, *command]


def run(ranks: int, *command: str) -> tuple[int, str]:
    env = {**environment(), **AS_ROOT}
    done = subprocess.run(
        mpirun(ranks, *command), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    return done.returncode, done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Some MB of code: lines cut into several units, and a packed file."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [text for _, text in modules(Path(os.__file__).parent)][:240]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in some) for some in (texts[:200], texts[200:])]
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines[1].encode()))
    return [folder / "a.jsonl", folder / "b.jsonl.zst"]


@pytest.fixture(scope="module")
def model(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_tokenizer(inputs, tmp_path_factory.mktemp("model") / "t", VOCAB, max_bytes=SAMPLE_BYTES).path


@pytest.fixture(scope="module")
def expected(inputs: list[Path], model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    prepare(inputs, folder / "d", model)
    return contents(folder)


def preparing(inputs: list[Path], model: str, out: Path, workers: int = 1) -> list[str]:
    return ["tools/prepare_data.py", *map(str, inputs), "--tokenizer", model, "--output", str(out / "d"), "--workers", str(workers)]


def test_both_tools_give_one_processs_files(inputs: list[Path], model: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path / "t"), "--vocab-size", str(VOCAB), "--max-bytes", str(SAMPLE_BYTES)]
    code, text = run(3, "tools/train_tokenizer.py", *map(str, inputs), *arguments)
    assert code == 0, text
    assert (tmp_path / "t.model").read_bytes() == Path(model).read_bytes()
    code, text = run(2, *preparing(inputs, model, tmp_path / "out", workers=2))
    assert code == 0, text
    assert contents(tmp_path / "out") == expected
    assert text.count("240 documents") == 1  # rank 0's


def test_killed_rank_ends_the_others_and_the_next_run_goes_on(
    inputs: list[Path], model: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    partial = tmp_path / "out" / "d.partial"
    process = subprocess.Popen(
        mpirun(2, *preparing(inputs, model, tmp_path / "out")),
        cwd=ROOT,
        env={**environment(), **AS_ROOT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    rank_1(process.pid).kill()
    assert process.wait(120) != 0
    finished = len(list(partial.glob("*.npz")))
    assert finished and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.partial"]
    code, text = run(3, *preparing(inputs, model, tmp_path / "out"))
    assert code == 0, text
    assert f"{finished} of " in text and "are finished already" in text
    assert contents(tmp_path / "out") == expected


def rank_1(launcher: int) -> psutil.Process:
    """The process that the launcher started as rank 1."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("OMPI_COMM_WORLD_RANK") == "1" and "tools/prepare_data.py" in process.cmdline():
            return process
    raise AssertionError("no rank 1")


def test_failing_rank_says_why_and_ends_the_others(inputs: list[Path], model: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\noops\n')
    code, text = run(2, *preparing([*inputs, tmp_path / "bad.jsonl"], model, tmp_path / "out"))
    assert code != 0
    assert "of 2 on " in text and "bad.jsonl, line 2: not valid JSON" in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("out/d.*x"))
