"""Figures of the data room on the standard library's sources: ``prepare`` against bare tokenizer calls, and fetching in a step."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from megastab.data.prepare import prepare
from megastab.data.stdlib_corpus import write_corpus
from megastab.data.tokenizer_training import train_tokenizer
from megastab.report.bench.cases import SIZES, Options, Spec
from megastab.report.bench.jobs import Job
from megastab.report.bench.rows import Row
from megastab.report.bench.series import take_turns
from megastab.report.bench.speed import WARMUP

PREPARE_BOUND, FETCH_BOUND_PERCENT = 0.9, 1.0
COPIES = 8  # the corpus this many times over, so that starting processes does not decide


def data(options: Options) -> Iterator[Row]:
    """Both figures; the second reads what the first wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, prefix = folder / "corpus.jsonl", folder / "tokens"
        write_corpus(corpus)
        model = train_tokenizer([corpus], folder / "tokenizer", SIZES["A"]["vocab_size"], max_bytes=2_000_000).path
        yield _throughput(corpus, prefix, model, options)
        yield _fetching(prefix, options)


def _throughput(corpus: Path, prefix: Path, model: str, options: Options) -> Row:
    copies, workers = (1 if options.is_quick else COPIES), options.threads
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    num_bytes = sum(len(text.encode()) for text in texts)
    bare, ours = [], []
    for _ in range(options.repeats):
        bare.append(num_bytes / _bare_seconds(model, texts))
        began = time.perf_counter()
        prepare([corpus] * copies, prefix, model, workers, progress=False)
        ours.append(copies * num_bytes / (time.perf_counter() - began))
    value = median(ours) / (workers * median(bare))
    mine, other = median(ours) / 1e6, median(bare) / 1e6
    detail = f"prepare {mine:.2f} MB/s of text with {workers} workers; one process that only calls SentencePiece {other:.2f} MB/s"
    raw = {"prepare_bytes_per_second": ours, "bare_bytes_per_second": bare}
    return Row("data", f"prepare, {copies * num_bytes / 1e6:.0f} MB", value, bound=PREPARE_BOUND, detail=detail, raw=raw)


def _bare_seconds(model: str, texts: list[str]) -> float:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=model)
    began = time.perf_counter()
    for text in texts:
        processor.encode(text)
    return time.perf_counter() - began


def _fetching(prefix: Path, options: Options) -> Row:
    with Job(Spec("ours", "A", data=str(prefix)), options.threads) as job:
        (replies,) = take_turns([job], WARMUP, options.rounds)
    fetching, seconds = [reply.fetching for reply in replies], [reply.seconds[0] for reply in replies]
    share = 100 * median(fetching) / median(seconds)
    detail = f"{1e3 * median(fetching):.2f} ms of {1e3 * median(seconds):.0f} ms a step"
    raw = {"fetch_seconds": fetching, "step_seconds": seconds}
    return Row("data", "fetching in a step of A", share, "%", FETCH_BOUND_PERCENT, False, detail, raw)
