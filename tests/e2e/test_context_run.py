"""Ranks that share sequences, through the launcher: the curve of one rank, a resume on one, a sample and an export of what they saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import curve, launch, records, tool

CP2 = "megastab.parallel.context=2"


def test_a_run_over_shared_sequences_is_the_run_of_one_rank(config_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--deepspeed_config", str(config_file)]
    assert launch(*options, f"megastab.run.dir={one}", ranks=1).code == 0
    more = ["megastab.run.async_save=true", "megastab.run.save_interval=3", "megastab.parallel.activation_offload.kind=ssd"]
    offload = {"folder": tmp_path / "offload", "amount": "all", "min_kb": 0}
    more += [f"megastab.parallel.activation_offload.{key}={value}" for key, value in offload.items()]
    shared = launch(*options, CP2, f"megastab.run.dir={two}", *more)
    assert shared.code == 0 and "tensor 1 x pipeline 1 x context 2 x data 1" in shared.text, shared.text
    assert "; 128 tokens a step" in shared.text
    assert [record["tokens"] for record in records(two)] == [record["tokens"] for record in records(one)] == [4 * 32] * 6
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)  # as between the other layouts

    (two / "checkpoints" / "latest").write_text("step00000003")
    resumed = launch(*options, f"megastab.run.dir={two}", ranks=1)
    assert resumed.code == 0 and "context 2 -> 1" in resumed.text, resumed.text
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)


def test_what_such_a_run_saved_is_sampled_from_and_exported(config_file: Path, tmp_path: Path) -> None:
    done = launch("--deepspeed_config", str(config_file), CP2, "megastab.model.num_kv_heads=1", "megastab.run.total_steps=2")
    assert done.code == 0, done.text
    run = tmp_path / "run"
    sample = tool("tools/sample.py", "--run", str(run), "--prompt", "import ", "--max-tokens", "8", "--seed", "1")
    assert sample.code == 0 and "import " in sample.text, sample.text
    export = tool("tools/convert.py", "export", str(run), str(tmp_path / "hf"))
    assert export.code == 0 and (tmp_path / "hf" / "model.safetensors").exists(), export.text


def test_a_context_that_fits_no_head_is_told_once(config_file: Path) -> None:
    done = launch("--deepspeed_config", str(config_file), "megastab.parallel.context=3", "megastab.model.max_seq_len=33", ranks=3)
    assert done.code != 0 and done.text.count("megastab.parallel.context = 3 gives each rank") == 1, done.text
    assert "Traceback" not in done.text
