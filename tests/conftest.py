"""Every test runs on the CPU with one thread a rank, whatever the machine has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


MOST_WORKERS = 8  # the longest file, the equivalence matrix, is one worker's


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Workers for ``-n auto``: both cores of two, half of more because a test has up to four ranks; none where one file is asked for."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist takes it
    cores = len(os.sched_getaffinity(0))
    files = {argument.partition("::")[0] for argument in config.args}
    is_one_file = len(files) == 1 and files.pop().endswith(".py")
    return 0 if cores == 1 or is_one_file else min(max(2, cores // 2), MOST_WORKERS)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small real dataset: tok.model, text_train and text_valid."""
    from megastab.data.prepare import prepare
    from megastab.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("text")
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    documents = [json.dumps({"text": source.read_text(errors="ignore")}) for source in sources]
    (folder / "text.jsonl").write_text("\n".join(documents) + "\n")
    train_tokenizer([folder / "text.jsonl"], folder / "tok", 512)
    prepare([folder / "text.jsonl"], folder / "text", folder / "tok.model", workers=1, valid_fraction=0.2, progress=False)
    return folder


@pytest.fixture
def tiny_config(text_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A LLaMA that trains in seconds; ``run.dir`` is this test's own."""
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.1}},
        "megastab": {
            "model": {"arch": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 32},
            "data": {
                "train": [[1.0, str(text_data / "text_train")]],
                "valid": [[1.0, str(text_data / "text_valid")]],
                "tokenizer": str(text_data / "tok.model"),
            },
            "schedule": {"warmup_steps": 2},
            "run": {"dir": str(tmp_path / "run"), "total_steps": 6, "eval_samples": 8, "log_interval": 1},
        },
    }


@pytest.fixture
def config_file(tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    """``tiny_config`` as a file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    return path
