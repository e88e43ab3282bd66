"""Bad input ends a job within seconds, on all ranks, with one message that names the thing and the fix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import launch, pretrain


def truncate_bin(data: Path) -> list[str]:
    path = data / "text_train.bin"
    path.write_bytes(path.read_bytes()[:1000])
    return []


def corrupt_idx(data: Path) -> list[str]:
    (data / "text_train.idx").write_bytes(b"not an index" * 10)
    return []


def remove_data(data: Path) -> list[str]:
    (data / "text_train.bin").unlink()
    (data / "text_train.idx").unlink()
    return []


def other_tokenizer(data: Path) -> list[str]:
    from megastab.data.tokenizer_training import train_tokenizer

    train_tokenizer([data / "text.jsonl"], data / "tok", 400)
    return []


CASES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "misspelt key of ours": (lambda d: ["megastab.run.total_stpes=3"], ("megastab.run.total_stpes", "megastab.run.total_steps")),
    "misspelt key of DeepSpeed's": (lambda d: ["gradient_cliping=1.0"], ("gradient_cliping", "gradient_clipping")),
    "heads over tp": (lambda d: ["megastab.model.num_heads=1", "megastab.model.num_kv_heads=1"], ("num_heads", "tensor")),
    "pipeline with ZeRO 2": (
        lambda d: ["megastab.parallel.tensor=1", "megastab.parallel.pipeline=2", "zero_optimization.stage=2"],
        ("pipeline", "zero_optimization.stage"),
    ),
    "world not divisible": (lambda d: ["megastab.parallel.tensor=3"], ("megastab.parallel.tensor", "2 ranks")),
    "sequence longer than the data": (lambda d: ["megastab.model.max_seq_len=1000000"], ("tokens", "1000001")),
    "missing data": (remove_data, ("text_train", "prepare_data")),
    "truncated .bin": (truncate_bin, ("text_train.bin",)),
    "corrupt .idx": (corrupt_idx, ("text_train.idx",)),
    "another tokenizer": (other_tokenizer, ("tokenizer",)),
    "missing checkpoint": (lambda d: ["megastab.run.resume=/nowhere/checkpoints"], ("/nowhere/checkpoints", "megastab.run.resume")),
}
# The launcher's part is the same for all: one that every rank finds alone, and one that is found together.
LAUNCHED = ("misspelt key of ours", "missing data")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_the_job_with_one_message(name: str, config_file: Path, text_data: Path, tmp_path: Path) -> None:
    spoil, words = CASES[name]
    copy = tmp_path / "data"
    shutil.copytree(text_data, copy)
    config_file.write_text(config_file.read_text().replace(str(text_data), str(copy)))
    start = launch if name in LAUNCHED else pretrain
    done = start("--deepspeed_config", str(config_file), "megastab.parallel.tensor=2", *spoil(copy), timeout=180)
    assert done.code != 0
    assert done.text.count("error: ") == 1 and "Traceback" not in done.text, done.text
    message = done.text[done.text.index("error: ") :]
    for word in words:
        assert word in message, message


def test_checkpoint_of_another_model_is_refused_and_left_alone(config_file: Path, tmp_path: Path) -> None:
    options = ("--deepspeed_config", str(config_file), "megastab.run.total_steps=1")
    assert pretrain(*options, ranks=1).code == 0
    before = (tmp_path / "run" / "config.json").read_text()
    done = pretrain(*options, "megastab.model.num_layers=3", ranks=1)
    assert done.code == 2 and "num_layers 2 there, 3 here" in done.text and "Traceback" not in done.text
    assert (tmp_path / "run" / "config.json").read_text() == before
    other = pretrain(*options, "zero_optimization.stage=1", ranks=1)
    assert other.code == 0 and "another shape: zero_stage 0 -> 1" in other.text  # a shape is no other model
