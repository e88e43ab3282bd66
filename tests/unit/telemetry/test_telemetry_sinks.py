"""The files of a run, the console line, and the monitor's tags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megastab.stability.record import Event, StepRecord
from megastab.telemetry.sinks import RunFolder, console_line, restart_monitor, to_monitor
from megastab.telemetry.tags import TAGS, to_markdown
from megastab.telemetry.throughput import peak_memory_gb, rates

RECORD = StepRecord(7, 5.1234, 1e-3, 1.5, 1.0, 0.66, None, "clip", "", 0, 4096, 0.5)
EXTRA = {"tokens_per_second": 8192.0, "model_tflops": 0.25, "memory_gb": 1.5}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_step_evaluation_and_event_are_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", is_writer=True)
    folder.step(RECORD, EXTRA)
    folder.evaluation(7, {"valid_loss": 4.0})
    folder.event(Event(7, "save", "there"))
    folder.write_config({"train_batch_size": 4})
    step, evaluation = lines(folder.path / "metrics.jsonl")
    assert step == {**dataclasses.asdict(RECORD), **EXTRA} and evaluation == {"step": 7, "valid_loss": 4.0}
    assert lines(folder.path / "events.jsonl") == [{"step": 7, "kind": "save", "reason": "there"}]
    assert json.loads((folder.path / "config.json").read_text()) == {"train_batch_size": 4}


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run", is_writer=False)
    folder.step(RECORD, EXTRA)
    folder.evaluation(1, {})
    folder.event(Event(1, "save", ""))
    folder.write_config({})
    folder.drop_after(0)
    folder.say("hello")
    assert not folder.path.exists() and capsys.readouterr().out == ""


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, is_writer=True)
    for step in (1, 2, 3, 4):
        folder.step(dataclasses.replace(RECORD, step=step), {})
        folder.rank_times({"step": step})
    folder.event(Event(4, "skip", ""))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    folder.drop_after(2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path / "rank_times.jsonl")] == [1, 2]
    (event,) = lines(tmp_path / "events.jsonl")
    assert event == {"step": 4, "kind": "skip", "reason": "", "undone": True} and folder.told() == []


def test_a_new_run_keeps_the_old_one_aside(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        folder = RunFolder(tmp_path / "run", is_writer=True, is_new=True)
        folder.write_config({"name": name})
    names = {path.name: json.loads((path / "config.json").read_text())["name"] for path in tmp_path.iterdir()}
    assert names == {"run": "c", "run.1": "a", "run.2": "b"}


def test_console_line_says_the_step() -> None:
    said = console_line(RECORD, 1000, EXTRA)
    assert said == "step    7/1000  loss 5.1234  norm 1.500 clipped to 0.990  lr 1.00e-03  8.2k tokens/s  0.25 TFLOP/s/rank  1.50 GB"
    skipped = dataclasses.replace(RECORD, grad_norm=float("inf"), action="skip", reason="the gradient norm is not finite")
    assert "norm inf skipped (the gradient norm is not finite)" in console_line(skipped, 10, EXTRA)
    clipped = dataclasses.replace(RECORD, grad_norm=8.0, clip_scale=0.25, action="clip", z=3.21)
    assert "norm 8.000 clipped to 2.000 (z 3.2)" in console_line(clipped, 10, EXTRA)
    assert "MFU 41.0 %" in console_line(RECORD, 10, {**EXTRA, "mfu": 0.41})


def test_monitor_gets_tag_names_and_only_known_keys() -> None:
    sent: list = []
    to_monitor(SimpleNamespace(enabled=True, write_events=sent.extend), 7, {"loss": 2, "mfu": 0.5, "unknown": 1})
    assert sent == [("train/loss", 2.0, 7), ("speed/mfu", 0.5, 7)]
    to_monitor(SimpleNamespace(enabled=False), 7, {"loss": 2.0})


def test_every_tag_is_explained_and_unique() -> None:
    assert len({tag.name for tag in TAGS.values()}) == len(TAGS)
    page = to_markdown()
    assert all(f"`{tag.name}`" in page and tag.meaning and tag.bad for tag in TAGS.values())


def test_rates_are_per_second_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASTAB_PEAK_TFLOPS", "100")
    found = rates(tokens=1000, seconds=0.5, flops_per_token=1e11, ranks=4)
    assert found == {"tokens_per_second": 2000.0, "model_tflops": 50.0, "mfu": 0.5}
    monkeypatch.delenv("MEGASTAB_PEAK_TFLOPS")
    assert "mfu" not in rates(1000, 0.5, 1e11, 4), "no share of a peak nobody knows"
    assert 0.01 < peak_memory_gb() < 1000


def test_events_of_steps_taken_back_are_kept_and_marked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, is_writer=True)
    for step, kind in ((2, "clip"), (4, "skip"), (5, "rewind"), (5, "skip")):
        folder.event(Event(step, kind, "why"))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"step": 6, "ki')
    folder.drop_after(3)
    folder.drop_after(3)
    found = [(line["step"], line["kind"], line.get("undone", False)) for line in lines(tmp_path / "events.jsonl")]
    assert found == [(2, "clip", False), (4, "skip", True), (5, "rewind", False), (5, "skip", True)]
    assert [line["kind"] for line in folder.told()] == ["clip", "rewind"] and not list(tmp_path.glob("*.new"))


def test_tensorboard_drops_what_comes_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    monitor = SimpleNamespace(tb_monitor=SimpleNamespace(summary_writer=writer))
    for step in (1, 2, 3, 4):
        writer.add_scalar("loss", 1.0, step)
    restart_monitor(monitor, 2)
    for step in (3, 4, 5):
        writer.add_scalar("loss", 2.0, step)
    writer.close()
    told = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(each.step, each.value) for each in told] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    restart_monitor(SimpleNamespace(), 2)  # nothing to restart
