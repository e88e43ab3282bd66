"""Same bytes for any number of workers, equal to megatron-core's own builder, and no part of a dataset left behind by a failure."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from corpora import write_jsonl

from megastab.config.errors import UserError
from megastab.data.prepare import prepare
from megastab.data.sidecar import read_sidecar
from megastab.data.tokenizer import Tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder, without the finished parts that a failed run keeps in one of its own."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("workers", [2, 3])
def test_output_does_not_depend_on_workers_or_units(tokenizer: Tokenizer, corpus: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "z.txt").write_text("a text file among the lines\n" * 50)
    inputs = [corpus, tmp_path / "z.txt", corpus]
    prepare(inputs, tmp_path / "one" / "d", tokenizer.path, workers=1, valid_fraction=0.2)
    prepare(inputs, tmp_path / "many" / "d", tokenizer.path, workers=workers, valid_fraction=0.2, unit_bytes=3000)
    one, many = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert sorted(one) == [f"d_{split}.{suffix}" for split in ("train", "valid") for suffix in ("bin", "idx", "json")]
    assert one == many


@pytest.mark.parametrize("vocab_size", [400, 70_000])
def test_files_equal_those_of_megatrons_builder(
    tokenizer: Tokenizer, corpus: Path, texts: list[str], tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(Tokenizer, "vocab_size", vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    prepare([corpus], tmp_path / "ours", tokenizer.path)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_megatron_reads_back_the_texts(tokenizer: Tokenizer, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare([corpus], tmp_path / "d", tokenizer.path, append_eod=False)
    dataset = IndexedDataset(str(tmp_path / "d"))
    assert [tokenizer.decode(dataset[number]) for number in range(len(dataset))] == texts
    assert len(dataset.document_indices) == len(texts) + 1


def test_sidecar_says_what_was_written(tokenizer: Tokenizer, corpus: Path, texts: list[str], tmp_path: Path) -> None:
    returned = prepare([corpus], tmp_path / "d", tokenizer.path, workers=2, unit_bytes=5000)
    counts = Counter(token for text in texts for token in [*tokenizer.encode(text), tokenizer.eod])
    num_tokens, num_bytes = counts.total(), sum(len(text.encode()) for text in texts)
    entropy = -sum(count / num_tokens * math.log2(count / num_tokens) for count in counts.values())
    sidecar = read_sidecar(str(tmp_path / "d"))
    assert sidecar is not None and returned == {str(tmp_path / "d"): sidecar}
    assert (sidecar.tokenizer, sidecar.vocab_size) == (tokenizer.fingerprint, 400)
    assert (sidecar.documents, sidecar.tokens, sidecar.text_bytes) == (len(texts), num_tokens, num_bytes)
    assert sidecar.unigram_bits_per_byte == pytest.approx(entropy * num_tokens / num_bytes, rel=1e-12)


def test_split_is_by_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(400)]
    forward = write_jsonl(tmp_path / "forward.jsonl", texts)
    backward = write_jsonl(tmp_path / "backward.jsonl", texts[::-1] + texts[:100])
    first = prepare([forward], tmp_path / "f", tokenizer.path, valid_fraction=0.25)
    prepare([backward], tmp_path / "b", tokenizer.path, valid_fraction=0.25)
    assert 60 <= first[f"{tmp_path}/f_valid"].documents <= 140  # 100 +- 4.6 standard deviations
    valid = {split: valid_texts(tokenizer, tmp_path / split) for split in ("f_valid", "b_valid", "b_train")}
    assert valid["f_valid"] == valid["b_valid"]  # duplicates included: none is in both splits
    assert not valid["b_valid"] & valid["b_train"]


def valid_texts(tokenizer: Tokenizer, prefix: Path) -> set[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return {tokenizer.decode(dataset[number]) for number in range(len(dataset))}


def test_empty_documents_are_counted_in_a_warning(tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ["a", "", "  ", "b"])
    with caplog.at_level(logging.WARNING):
        written = prepare([path], tmp_path / "d", tokenizer.path)
    assert written[str(tmp_path / "d")].documents == 2
    assert "skipped 2 empty documents" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_failure_names_the_line_and_leaves_no_dataset(tokenizer: Tokenizer, corpus: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 9 + "oops\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"bad\.jsonl, line 10: .*not valid JSON"):
        prepare([corpus, tmp_path / "bad.jsonl", corpus], tmp_path / "out" / "d", tokenizer.path, workers, unit_bytes=4000)
    assert contents(tmp_path / "out") == {}


def test_failure_keeps_the_older_dataset(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "out" / "d", tokenizer.path)
    before = contents(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("oops\n")
    with pytest.raises(UserError):
        prepare([tmp_path / "bad.jsonl"], tmp_path / "out" / "d", tokenizer.path)
    assert contents(tmp_path / "out") == before


def test_split_without_documents_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ["only one"])
    with pytest.raises(UserError, match="no document for .*_(valid|train).*valid_fraction 0.5"):
        prepare([path], tmp_path / "d", tokenizer.path, valid_fraction=0.5)
    with pytest.raises(UserError, match="no document for"):
        prepare([write_jsonl(tmp_path / "e.jsonl", [""])], tmp_path / "e", tokenizer.path)


@pytest.mark.parametrize("wrong", [{"valid_fraction": 1.0}, {"valid_fraction": -0.1}, {"workers": 0}])
def test_impossible_options_are_refused(tokenizer: Tokenizer, corpus: Path, tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        prepare([corpus], tmp_path / "d", tokenizer.path, **wrong)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_cleans_up(tokenizer: Tokenizer, texts: list[str], tmp_path: Path, number: signal.Signals) -> None:
    big = write_jsonl(tmp_path / "big.jsonl", texts * 200)  # ten seconds of work
    out = tmp_path / "out"
    out.mkdir()
    tool = Path(__file__).parents[3] / "tools" / "prepare_data.py"
    command = [sys.executable, str(tool), str(big), "--output", str(out / "d"), "--tokenizer", tokenizer.path, "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1])}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background job inherits SIGINT ignored
    )
    deadline = time.monotonic() + 30
    while not list(out.glob("*/*.all")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) != 0
    assert contents(out) == {}


def test_killed_worker_ends_the_run(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    big = write_jsonl(tmp_path / "big.jsonl", texts * 200)
    (tmp_path / "out").mkdir()

    def kill_one() -> None:
        while not list(tmp_path.glob("out/*/*.all")):
            time.sleep(0.02)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(UserError, match="a worker of 2 was killed.*fewer workers"):
        prepare([big], tmp_path / "out" / "d", tokenizer.path, workers=2)
    assert contents(tmp_path / "out") == {}


def test_tools_make_a_dataset_and_report_errors_in_one_line(corpus: Path, tmp_path: Path) -> None:
    tools = Path(__file__).parents[3] / "tools"
    environment = {**os.environ, "PYTHONPATH": str(tools.parent)}

    def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(tools / tool), *arguments], env=environment, capture_output=True, text=True)

    trained = run("train_tokenizer.py", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "400")
    assert trained.returncode == 0 and "400 pieces" in trained.stdout
    made = run("prepare_data.py", str(corpus), "--output", str(tmp_path / "d"), "--tokenizer", str(tmp_path / "t.model"), "--workers", "1")
    assert made.returncode == 0 and "300 documents" in made.stdout
    assert json.loads((tmp_path / "d.json").read_text())["documents"] == 300
    failed = run("prepare_data.py", "none.txt", "--output", str(tmp_path / "x"), "--tokenizer", str(tmp_path / "t.model"))
    assert failed.returncode == 1 and failed.stderr == "error: none.txt: no such file\n"


def test_preparing_imports_no_torch() -> None:
    code = "import sys, megastab.data.prepare, megastab.data.tokenizer_training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
