"""The whole product: train, stop, resume, sample, draw; through the launcher once, and by its ranks alone where it adds nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import curve, launch, pretrain, records, tool

TP2 = "megastab.parallel.tensor=2"


def test_a_run_leaves_what_it_promises(config_file: Path, tmp_path: Path) -> None:
    done = launch("--deepspeed_config", str(config_file), TP2, "tensorboard.enabled=true", "megastab.run.save_interval=3")
    assert done.code == 0, done.text
    run = tmp_path / "run"
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert all(r["grad_norm"] > 0 and r["tokens"] == 4 * 32 for r in records(run))
    assert "valid loss" in done.text and "the unigram entropy" in done.text
    assert json.loads((run / "config.json").read_text())["megastab"]["parallel"]["tensor"] == 2
    assert list((run / "tensorboard").rglob("events.out.tfevents*"))
    assert (run / "checkpoints" / "latest").read_text() == "step00000006"
    sample = tool("tools/sample.py", "--run", str(run), "--prompt", "import ", "--max-tokens", "8", "--seed", "1")
    assert sample.code == 0 and "import " in sample.text, sample.text
    report = tool("tools/report.py", str(run))
    assert report.code == 0, report.text
    assert [path for path in run.glob("*.png") if path.stat().st_size > 10_000], list(run.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_interrupted_run_goes_on_the_same_curve(config_file: Path, tmp_path: Path, dtype: str) -> None:
    options = ["--deepspeed_config", str(config_file), TP2, *(["bf16.enabled=true"] if dtype == "bf16" else [])]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert pretrain(*options, f"megastab.run.dir={whole}").code == 0
    # The first half ends at step 3 of a six-step schedule: its checkpoint is what a killed run would leave.
    assert pretrain(*options, f"megastab.run.dir={halves}", "megastab.run.save_interval=3").code == 0
    (halves / "checkpoints" / "latest").write_text("step00000003")
    resumed = pretrain(*options, f"megastab.run.dir={halves}")
    assert resumed.code == 0 and "resumed from" in resumed.text, resumed.text
    assert curve(halves) == curve(whole)  # to the last bit


def test_library_layouts_share_one_curve(config_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert pretrain("--deepspeed_config", str(config_file), f"megastab.run.dir={one}", ranks=1).code == 0
    staged = pretrain(
        "--deepspeed_config", str(config_file), f"megastab.run.dir={two}", TP2, "megastab.parallel.pipeline=2",
        "megastab.parallel.sequence=true", "gradient_accumulation_steps=2", ranks=4,
    )  # fmt: skip
    assert staged.code == 0, staged.text
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)  # five AdamW steps on top of the matrix test's 2e-6


def test_every_spike_and_rescale_leaves_a_reason(config_file: Path, tmp_path: Path) -> None:
    stable = ["megastab.stability.zclip.warmup_steps=2", "megastab.stability.zclip.z_thresh=0.3"]
    stable += ["megastab.stability.tvr.target_std=0.015", "megastab.stability.tvr.interval_steps=3"]
    done = pretrain("--deepspeed_config", str(config_file), "megastab.parallel.pipeline=2", *stable)
    assert done.code == 0, done.text
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rescaled = [event["reason"] for event in events if event["kind"] == "rescale"]
    assert any("layers.0" in why for why in rescaled) and any("layers.1" in why for why in rescaled)  # of both stages
    clipped = [record for record in records(tmp_path / "run") if record["action"] == "clip"]
    told = {event["step"]: event for event in events if event["kind"] == "clip"}
    assert clipped and all("is above 0.3" in told[r["step"]]["reason"] for r in clipped)
    for record in clipped:
        event = told[record["step"]]
        assert event["norm"] == record["grad_norm"] and event["z"] == record["z"] and event["threshold"] == record["clip_threshold"]
        assert event["samples"] == [4 * record["step"] - 4, 4 * record["step"] - 1]
        shares = [each["share"] for each in event["top"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0.2 < sum(shares) <= 1
    assert any(record["rescaled"] == 14 for record in records(tmp_path / "run"))  # 7 matrices of 2 layers


def test_second_run_moves_the_first_aside(config_file: Path, tmp_path: Path) -> None:
    options = ["--deepspeed_config", str(config_file), "megastab.run.resume=none", "megastab.run.total_steps=2"]
    assert pretrain(*options, ranks=1).code == 0
    again = pretrain(*options, ranks=1)
    assert again.code == 0 and "kept as" in again.text
    assert len(records(tmp_path / "run")) == len(records(tmp_path / "run.1")) == 2


def test_plain_python_is_a_job_of_one_rank(config_file: Path) -> None:
    done = tool("megastab/pretrain.py", "--deepspeed_config", str(config_file), "megastab.run.total_steps=1")
    assert done.code == 0 and "step 1/1" in done.text, done.text
