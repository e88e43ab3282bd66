"""The page's ranks: from rank_times.jsonl as the trainer writes it, or as a crash, another layout or another version left it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastab.report.history import read_history
from megastab.report.page import write_page
from megastab.report.ranks import MOST_COLUMNS, MOST_ROWS, figure_of_ranks, ranks, times_of
from megastab.stability.record import Event
from megastab.telemetry.straggler import Window
from tests.unit.report.conftest import RunMaker
from tests.unit.report.test_report_page import Reader

SLOW = Event(5, "straggler", "rank 3 on node7 needs ...", {"rank": 3, "host": "node7 <b>", "stage": 1, "is_over": False})


def window(step: int, num_ranks: int = 4, factors: Mapping[int, float] | None = None, num_stages: int = 2) -> Window:
    """Stage 1 takes twice as long as stage 0 by nature; ``factors`` are over that, by rank."""
    stages = [rank * num_stages // num_ranks for rank in range(num_ranks)]
    own = [(1.0 + stage) * (factors or {}).get(rank, 1.0) for rank, stage in enumerate(stages)]
    return Window(step, 5, own, [0.01] * num_ranks, stages, 0.2)


def write(run: RunMaker, windows: list[Window], more: str = "") -> Path:
    folder = run(events=(SLOW,))
    (folder / "rank_times.jsonl").write_text("".join(json.dumps(each.to_json()) + "\n" for each in windows) + more)
    return folder


def page_of(folder: Path) -> Reader:
    page = Reader()
    page.feed(write_page(folder).read_text())
    return page


def test_the_page_names_the_slow_rank_and_its_host(run: RunMaker) -> None:
    page = page_of(write(run, [window(5), window(10, factors={3: 1.5}), window(15, factors={3: 1.3})]))
    assert "4 ranks, 3 windows up to step 15; 1 rank at least 20 % over" in page.text
    assert "the slowest was rank 3, at 1.3 times the median" in page.text
    assert ["3", "node7 <b>", "1", "2 of 3", "1.5", "10", "3", "0.01", "computing"] in page.rows


def test_stages_that_differ_by_nature_are_no_news(run: RunMaker) -> None:
    page = page_of(write(run, [window(5), window(10)]))
    assert "no rank at least 20 % over" in page.text and not any("node7 <b>" in cell for row in page.rows for cell in row)


@pytest.mark.parametrize("windows", [[], [window(5, 1, num_stages=1)], [window(5, 2)]], ids=["none", "one rank", "ranks without peers"])
def test_without_peers_there_is_no_section(run: RunMaker, windows: list[Window]) -> None:
    history = read_history(write(run, windows))
    assert ranks(history) == "" and times_of(history) is None


def test_windows_of_an_earlier_layout_are_left_out(run: RunMaker) -> None:
    times = times_of(read_history(write(run, [window(5, 8, {1: 2.0}), window(10), window(15)])))
    assert times is not None and times.steps == [10, 15] and times.slow == {}


def test_what_a_crash_or_another_version_left_does_no_harm(run: RunMaker) -> None:
    odd: list[dict[str, Any]] = [
        {"step": 6}, {"step": 7, "own_seconds": [1.0], "data_seconds": [], "stages": [0]}, {"step": 8, "own_seconds": 3, "stages": [0]},
        {"step": 9, "own_seconds": [1.0, "x", None, 2.0], "data_seconds": [0.1] * 4, "stages": [0, 0, 1, 1]},
    ]  # fmt: skip
    folder = write(run, [window(5)], "".join(json.dumps(line) + "\n" for line in odd) + '{"step": 10, "own_sec')
    times = times_of(read_history(folder))
    assert times is not None and times.steps == [5, 9] and times.paces[1] == {}, "on each stage one rank is known"
    assert "Ranks" in page_of(folder).text


@pytest.mark.parametrize(("num_ranks", "num_windows"), [(2, 1), (4, 30), (512, 20), (600, 900)])
def test_the_picture_shows_one_slow_rank_whatever_their_number(run: RunMaker, num_ranks: int, num_windows: int) -> None:
    slow, last = num_ranks // 2 - 1, num_windows
    windows = [window(5 * n, num_ranks, {slow: 1.5} if n == last else None, num_stages=1) for n in range(1, last + 1)]
    times = times_of(read_history(write(run, windows)))
    assert times is not None
    picture = figure_of_ranks(times)
    axes = picture.axes[0]
    (image,) = axes.images
    cells = np.asarray(image.get_array())
    assert cells.shape[0] <= MOST_ROWS and cells.shape[1] <= MOST_COLUMNS
    rows, columns = np.nonzero(cells > 1.2)
    assert list(columns) == [cells.shape[1] - 1] and list(rows) == [slow * cells.shape[0] // num_ranks]
    assert f"rank {slow}" in [label.get_text() for axis in axes.child_axes for label in axis.get_yticklabels()]
    assert [at for axis in axes.child_axes for at in axis.get_yticks()] == list(rows)
    picture.canvas.draw()  # type: ignore[attr-defined]
    box = image.get_window_extent()
    assert box.height / cells.shape[0] > 2, "pixels a row"
    pixels = np.asarray(picture.canvas.buffer_rgba())[..., :3].astype(int)  # type: ignore[attr-defined]
    inside = pixels[:, int(box.x1) - 1 if cells.shape[1] > 100 else int(box.x1 - 3)]
    assert (inside[:, 0] - inside[:, 1] > 200).any(), "red, at the right edge"
