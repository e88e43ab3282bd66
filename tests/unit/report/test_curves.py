from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megastab.config.errors import UserError
from megastab.report.curves import draw_curves, figure_of, running_median, spans_decade
from megastab.report.history import read_history
from megastab.stability.record import Event
from tests.unit.report.conftest import RunMaker

ROOT = Path(__file__).parents[3]


def labels(axes: Any) -> dict[str, Any]:
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def test_a_png_is_written_in_the_run_folder(run: RunMaker) -> None:
    out = draw_curves(run({}))
    assert out.name == "curves.png" and out.read_bytes().startswith(b"\x89PNG")


def test_and_elsewhere_when_asked(run: RunMaker, tmp_path: Path) -> None:
    assert draw_curves(run({}), tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"


def test_panels_hold_the_numbers(run: RunMaker) -> None:
    figure = figure_of(read_history(run({}, {20: 0.7, 40: 0.6})))
    loss, norm, rate = figure.axes
    assert list(loss.get_lines()[0].get_ydata()[:3]) == [8.0, 4.0, 8.0 / 3]
    valid = labels(loss)["validation"]
    assert (list(valid.get_xdata()), list(valid.get_ydata())) == ([20, 40], [0.7, 0.6])
    assert list(labels(norm)["cap"].get_ydata()) == [1.0] * 40
    assert list(rate.get_lines()[0].get_ydata()) == [1e-3] * 40
    assert loss.get_xlim() == norm.get_xlim() == rate.get_xlim()


def test_clipped_and_skipped_steps_are_marked(run: RunMaker) -> None:
    changes = {3: {"action": "clip", "grad_norm": 4.0}, 9: {"action": "clip", "grad_norm": 2.0}, 12: {"action": "skip", "grad_norm": 5.0}}
    marked = labels(figure_of(read_history(run(changes))).axes[1])
    clipped = marked["clipped (2 of 40 steps)"]
    assert (list(clipped.get_xdata()), list(clipped.get_ydata())) == ([3, 9], [4.0, 2.0])
    assert list(marked["skipped"].get_xdata()) == [12]


def test_what_was_not_finite_is_a_marker_at_the_top(run: RunMaker) -> None:
    path = run({5: {"grad_norm": math.inf, "action": "skip"}, 6: {"loss": math.nan}})
    loss, norm, _ = figure_of(read_history(path)).axes
    assert list(labels(loss)["not finite: 1 step"].get_xdata()) == [6]
    marker = labels(norm)["not finite (skipped): 1 step"]
    assert list(marker.get_xdata()) == [5]
    assert marker.get_transform() == norm.get_xaxis_transform() and 0.9 < marker.get_ydata()[0] <= 1.0
    draw_curves(path)


def test_the_norm_is_logarithmic_over_more_than_a_decade(run: RunMaker) -> None:
    assert figure_of(read_history(run({7: {"grad_norm": 12.0}}))).axes[1].get_yscale() == "linear"
    assert figure_of(read_history(run({7: {"grad_norm": 16.0}}))).axes[1].get_yscale() == "log"
    assert not spans_decade([0.0, math.nan, 1.0, 10.0])
    assert spans_decade([math.inf, 1.0, 10.1])
    assert not spans_decade([])


def test_events_are_lines_and_saves_are_not(run: RunMaker) -> None:
    path = run({}, events=(Event(10, "save", "x"), Event(20, "resume", "x"), Event(30, "rewind", "x")))
    assert {"resume", "rewind"} <= labels(figure_of(read_history(path)).axes[0]).keys()
    assert "save" not in labels(figure_of(read_history(path)).axes[0])


def test_a_run_where_nothing_is_finite_is_drawn(run: RunMaker) -> None:
    nothing = {step: {"loss": math.nan, "grad_norm": math.inf, "action": "skip", "clip_threshold": None} for step in range(1, 41)}
    path = run(nothing)
    assert draw_curves(path).is_file()
    assert "no finite loss" in read_history(path).summary()


def test_running_median_ignores_what_is_not_finite() -> None:
    steps, values = running_median([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, math.nan, 3.0, 100.0, 5.0], 1)
    assert steps == [1, 2, 3, 4, 5, 5] and values == [1.0, 2.0, 51.5, 5.0, 52.5, 52.5]
    assert math.isnan(running_median([1.0], [math.nan], 3)[1][0])


def test_a_long_run_is_smoothed(run: RunMaker) -> None:
    axes = figure_of(read_history(run(num_steps=300))).axes[0]
    assert [label for label in labels(axes) if label.startswith("train, median of")]


def test_a_line_cut_off_by_a_crash_is_left_out(run: RunMaker) -> None:
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


def test_the_summary_says_what_happened(run: RunMaker) -> None:
    changes = {3: {"action": "clip"}, 5: {"action": "skip", "grad_norm": math.inf, "loss": math.nan}}
    assert read_history(run(changes, {40: 0.61})).summary() == (
        "run: 40 steps, 0.04 M tokens, loss 8.000 -> 0.200 (lowest 0.200), valid 0.610, 2.0k tokens/s, 1 clipped, 1 skipped"
    )


def test_the_command(run: RunMaker, tmp_path: Path) -> None:
    path = run({})
    done = subprocess.run([sys.executable, "tools/report.py", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    picture, page, summary = done.stdout.splitlines()
    assert (picture, page) == (str(path / "curves.png"), str(path / "report.html")) and summary.startswith("run: 40 steps")
    assert Path(picture).is_file() and Path(page).is_file()
    line = [sys.executable, "tools/report.py", str(tmp_path / "none")]
    failed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


def test_reading_a_run_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, megastab.report.curves; assert not {'torch', 'deepspeed', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_metrics_are_json_lines_others_can_read(run: RunMaker) -> None:
    lines = (run({5: {"grad_norm": math.inf}}) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[4])["grad_norm"] is None


def test_what_went_wrong_is_marked(spiky_run: Path) -> None:
    history = read_history(spiky_run)
    loss, norm, _ = figure_of(history).axes
    spike = labels(loss)["loss spike"]
    assert (list(spike.get_xdata()), list(spike.get_ydata())) == ([301], [history.column("loss")[300]])
    assert list(labels(loss)["skipped"].get_xdata()) == [450]
    ticks = labels(loss)["rescale (15)"].get_segments()
    assert [x for (x, _), _ in ticks] == list(range(200, 601, 50))
    assert "warning" in labels(loss) and not {"clip", "skip", "loss_spike", "save"} & labels(loss).keys()
    assert {300.0, 420.0} <= set(next(mark for label, mark in labels(norm).items() if label.startswith("clipped")).get_xdata())
    assert list(labels(norm)["not finite (skipped): 1 step"].get_xdata()) == [450]


def test_the_norm_lies_on_what_zclip_expected(spiky_run: Path) -> None:
    history = read_history(spiky_run)
    norm = figure_of(history).axes[1]
    assert "cap" not in labels(norm) and norm.get_yscale() == "log"
    assert list(labels(norm)["threshold"].get_ydata()[100:110]) == history.column("clip_threshold")[100:110]
    (band,) = labels(norm)["ZClip's mean +- std"].get_paths()
    mean, std = history.column("clip_mean")[99], history.column("clip_std")[99]
    at_100 = sorted(y for x, y in band.vertices if x == 100)
    assert at_100 == pytest.approx([mean - std, mean + std])
    assert min(y for _, y in band.vertices) > 0


def test_the_worst_steps_carry_their_number(spiky_run: Path, run: RunMaker) -> None:
    texts = [text.get_text() for text in figure_of(read_history(spiky_run)).axes[1].texts]
    assert texts[0] == "450" and texts[1] in ("300", "301") and "420" in texts and len(texts) == 5
    assert not {"300", "301"} <= set(texts)  # too near to be read
    last = figure_of(read_history(run({40: {"action": "skip"}}))).axes[1].texts[0]
    assert last.get_text() == "40" and last.get_horizontalalignment() == "right"


def test_a_name_is_no_formula(run: RunMaker) -> None:
    assert draw_curves(run(name="a$x_{$b")).is_file()
