from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megastab.config.errors import UserError
from megastab.report.curves import draw_curves, figure_of, running_median, spans_decade
from megastab.report.history import read_history
from megastab.stability.record import Event, StepRecord
from megastab.telemetry.sinks import RunFolder

ROOT = Path(__file__).parents[3]


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {"loss": 8.0 / step, "lr": 1e-3, "grad_norm": 1.5, "clip_threshold": 1.0, "clip_scale": 1.0}
    values |= {"z": None, "action": "apply", "reason": "", "rescaled": 0, "tokens": 1000, "seconds": 0.5}
    return StepRecord(step=step, **{**values, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder written as the trainer writes it: ``run({step: changes}, {step: validation loss}, events)``."""

    def make(changes: dict[int, dict[str, Any]], valid: dict[int, float] | None = None, events: tuple[Event, ...] = ()) -> Path:
        folder = RunFolder(tmp_path / "run", is_writer=True)
        for step in range(1, 41):
            folder.step(record(step, **changes.get(step, {})), {"tokens_per_second": 2000.0})
            if valid and step in valid:
                folder.evaluation(step, {"valid_loss": valid[step]})
        for event in events:
            folder.event(event)
        return folder.path

    return make


def labels(axes: Any) -> dict[str, Any]:
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def test_a_png_is_written_in_the_run_folder(run: Callable[..., Path]) -> None:
    out = draw_curves(run({}))
    assert out.name == "curves.png" and out.read_bytes().startswith(b"\x89PNG")


def test_and_elsewhere_when_asked(run: Callable[..., Path], tmp_path: Path) -> None:
    assert draw_curves(run({}), tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"


def test_panels_hold_the_numbers(run: Callable[..., Path]) -> None:
    figure = figure_of(read_history(run({}, {20: 0.7, 40: 0.6})))
    loss, norm, rate = figure.axes
    assert list(loss.get_lines()[0].get_ydata()[:3]) == [8.0, 4.0, 8.0 / 3]
    valid = labels(loss)["validation"]
    assert (list(valid.get_xdata()), list(valid.get_ydata())) == ([20, 40], [0.7, 0.6])
    assert list(labels(norm)["cap"].get_ydata()) == [1.0] * 40
    assert list(rate.get_lines()[0].get_ydata()) == [1e-3] * 40
    assert loss.get_xlim() == norm.get_xlim() == rate.get_xlim()


def test_clipped_and_skipped_steps_are_marked(run: Callable[..., Path]) -> None:
    changes = {3: {"action": "clip", "grad_norm": 4.0}, 9: {"action": "clip", "grad_norm": 2.0}, 12: {"action": "skip", "grad_norm": 5.0}}
    marked = labels(figure_of(read_history(run(changes))).axes[1])
    clipped = marked["clipped (2 of 40 steps)"]
    assert (list(clipped.get_xdata()), list(clipped.get_ydata())) == ([3, 9], [4.0, 2.0])
    assert list(marked["skipped"].get_xdata()) == [12]


def test_what_was_not_finite_is_a_marker_at_the_top(run: Callable[..., Path]) -> None:
    path = run({5: {"grad_norm": math.inf, "action": "skip"}, 6: {"loss": math.nan}})
    loss, norm, _ = figure_of(read_history(path)).axes
    assert list(labels(loss)["not finite: 1 step"].get_xdata()) == [6]
    marker = labels(norm)["not finite (skipped): 1 step"]
    assert list(marker.get_xdata()) == [5]
    assert marker.get_transform() == norm.get_xaxis_transform() and 0.9 < marker.get_ydata()[0] <= 1.0
    draw_curves(path)


def test_the_norm_is_logarithmic_over_more_than_a_decade(run: Callable[..., Path]) -> None:
    assert figure_of(read_history(run({7: {"grad_norm": 12.0}}))).axes[1].get_yscale() == "linear"
    assert figure_of(read_history(run({7: {"grad_norm": 16.0}}))).axes[1].get_yscale() == "log"
    assert not spans_decade([0.0, math.nan, 1.0, 10.0])
    assert spans_decade([math.inf, 1.0, 10.1])
    assert not spans_decade([])


def test_events_are_lines_and_saves_are_not(run: Callable[..., Path]) -> None:
    path = run({}, events=(Event(10, "save", "x"), Event(20, "resume", "x"), Event(30, "rewind", "x")))
    assert {"resume", "rewind"} <= labels(figure_of(read_history(path)).axes[0]).keys()
    assert "save" not in labels(figure_of(read_history(path)).axes[0])


def test_a_run_where_nothing_is_finite_is_drawn(run: Callable[..., Path]) -> None:
    nothing = {step: {"loss": math.nan, "grad_norm": math.inf, "action": "skip", "clip_threshold": None} for step in range(1, 41)}
    path = run(nothing)
    assert draw_curves(path).is_file()
    assert "no finite loss" in read_history(path).summary()


def test_running_median_ignores_what_is_not_finite() -> None:
    steps, values = running_median([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, math.nan, 3.0, 100.0, 5.0], 1)
    assert steps == [1, 2, 3, 4, 5, 5] and values == [1.0, 2.0, 51.5, 5.0, 52.5, 52.5]
    assert math.isnan(running_median([1.0], [math.nan], 3)[1][0])


def test_a_long_run_is_smoothed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "long", is_writer=True)
    for step in range(1, 301):
        folder.step(record(step), {})
    axes = figure_of(read_history(folder.path)).axes[0]
    assert [label for label in labels(axes) if label.startswith("train, median of")]


def test_a_line_cut_off_by_a_crash_is_left_out(run: Callable[..., Path]) -> None:
    path = run({})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "loss": 0.1, "l')
    assert len(read_history(path).steps) == 40


@pytest.mark.parametrize("text", [None, "", '{"step": 3, "valid_loss": 2.0}\n'])
def test_a_folder_without_steps_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="holds no step"):
        draw_curves(tmp_path)


def test_the_summary_says_what_happened(run: Callable[..., Path]) -> None:
    changes = {3: {"action": "clip"}, 5: {"action": "skip", "grad_norm": math.inf, "loss": math.nan}}
    assert read_history(run(changes, {40: 0.61})).summary() == (
        "run: 40 steps, 0.04 M tokens, loss 8.000 -> 0.200 (lowest 0.200), valid 0.610, 2.0k tokens/s, 1 clipped, 1 skipped"
    )


def test_the_command(run: Callable[..., Path], tmp_path: Path) -> None:
    path = run({})
    done = subprocess.run([sys.executable, "tools/report.py", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == str(path / "curves.png") and second.startswith("run: 40 steps")
    line = [sys.executable, "tools/report.py", str(tmp_path / "none")]
    failed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


def test_reading_a_run_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, megastab.report.curves; assert not {'torch', 'deepspeed', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_metrics_are_json_lines_others_can_read(run: Callable[..., Path]) -> None:
    lines = (run({5: {"grad_norm": math.inf}}) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[4])["grad_norm"] is None
