"""The page's look inside the model: from telemetry.jsonl as the trainer writes it, or as a crash or another version left it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastab.report.history import read_history
from megastab.report.inside import figure_of_samples, inside
from megastab.report.inside_attention import figure_of_attention, rows_of
from megastab.report.page import write_page
from megastab.telemetry.activations import Place, Site
from megastab.telemetry.heads import Head
from megastab.telemetry.moments import Entry, Summary
from megastab.telemetry.sampler import Sample
from megastab.telemetry.weights import MatrixSummary
from tests.unit.report.conftest import RunMaker
from tests.unit.report.test_report_page import Reader

LAYERS = 3


def seen(largest: float) -> Summary:
    entries = tuple(Entry(-value, 11, 0, 7, 99) for value in (largest, largest / 2, largest / 3))
    return Summary(entries, 0.3, 0.2, 30.0, 3.0, 0)


def sample(step: int, height: float) -> Sample:
    """Layer 1's stream holds ``height``; all other places 2."""
    sites: tuple[Site, ...] = ("residual", "attention", "mlp")
    places = {Place(layer, site): seen(height if (layer, site) == (1, "residual") else 2.0) for layer in range(LAYERS) for site in sites}
    matrices = {f"layers.{i}.attention.q": MatrixSummary(0.0, 0.02, math.nan, 1e-3, float(i), i / 10) for i in range(5)}
    return Sample(step, places, matrices)


def attending(step: int, height: float) -> Sample:
    """Head 2 of layer 1 puts 0.9 on the first key; its largest logit is ``height``."""
    plain = Head(4.0, 2.0, 0.1, 0.05, 0.0, 0.3)
    return Sample(step, attention={0: (plain,) * 4, 1: (plain, plain, Head(height, 0.5, 0.9, 0.05, 0.8, 0.1), plain)})


def write(run: RunMaker, samples: list[Sample], more: str = "") -> Path:
    folder = run()
    text = "".join(json.dumps(each.to_json(), allow_nan=False) + "\n" for each in samples)
    (folder / "telemetry.jsonl").write_text(text + more)
    return folder


def test_the_page_shows_where_it_is_massive(run: RunMaker) -> None:
    page = Reader()
    page.feed(write_page(write(run, [sample(1, 2.0), sample(20, 5000.0)])).read_text())
    assert "Inside the model" in page.text and "At step 20:" in page.text
    rows = {cells[0]: cells for cells in page.rows if cells}
    assert "massive" in rows["1"][1] and "-5000" in rows["1"][1] and "massive" not in rows["0"][1]
    assert rows["1"][2] == "sample 11, position 0, token 99, channel 7"
    named = [cells[0] for cells in page.rows if cells and cells[0].startswith("layers.")]
    assert named == [f"layers.{i}.attention.q" for i in (4, 3, 2, 1, 0)], "the largest share first"
    assert page.open == []


def test_the_picture_marks_massive_layers(run: RunMaker) -> None:
    figure = figure_of_samples(read_history(write(run, [sample(1, 2.0), sample(20, 5000.0), sample(40, math.inf)])))
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.images]
    grid = panels[0].images[0].get_array()
    assert grid.shape == (LAYERS, 3) and grid[1, 1] == pytest.approx(5000) and np.ma.getmaskarray(grid).tolist()[1] == [False, False, True]
    for axes in panels:
        marked = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
        assert marked == [(1, 1), (2, 1)], "inf is as massive as can be"
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["1", "20", "40"]


def test_the_page_shows_who_attends_to_the_first_key(run: RunMaker) -> None:
    page = Reader()
    page.feed(write_page(write(run, [attending(1, 3.0), attending(20, 55.5)])).read_text())
    assert "Attention at step 20;" in page.text and "Inside the model" in page.text
    rows = {cells[0]: cells for cells in page.rows if cells}
    assert rows["0"] == ["0", "4", "2", "2", "0.1", "0.1", "0.05", "0", "0.3"]
    assert rows["1"] == ["1", "55.5", "1.625", "0.5", "0.3", "0.9", "0.05", "0.2", "0.25"]


def test_the_picture_of_attention_has_layers_steps_and_heads(run: RunMaker) -> None:
    history = read_history(write(run, [attending(1, 3.0), attending(20, math.inf)]))
    mass, logit, heads = (axes for axes in figure_of_attention([(s["step"], rows_of(s)) for s in history.samples]).axes if axes.images)
    assert mass.images[0].get_array().flatten().tolist() == pytest.approx([0.1, 0.1, 0.3, 0.3])
    told = logit.images[0].get_array()
    assert told[:, 0].tolist() == [4.0, 4.0] and np.ma.getmaskarray(told).tolist() == [[False, False], [False, True]]
    assert heads.images[0].get_array().tolist() == [[0.1] * 4, [0.1, 0.1, 0.9, 0.1]]
    assert [tick.get_text() for tick in logit.get_xticklabels()] == ["1", "20"] and heads.get_xlabel() == "head"


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 7, "attention": [{"layer": 1, "first_key_mass": ["<script>"]}, {"layer": -1}, 7, {"layer": 0, "entropy": 3}]}',
        '{"step": 7, "attention": [{"layer": 2, "first_key_mass": [], "largest_logit": [null, 1e999], "first_key_uniform": "x"}]}',
        '{"step": 7, "attention": {"layer": 1}}',
        '{"step": 7, "activ',
        '{"step": 7}',
        '{"step": 7, "activations": null, "weights": [3]}',
        '{"step": 7, "activations": [{"layer": 0, "site": "residual"}, {"layer": "x", "site": "residual"}, 4], "weights": [{}]}',
        '{"step": 7, "activations": [{"layer": 0, "site": "residual", "max": 1e999, "top": []}]}',
        '{"step": 7, "activations": [{"layer": 0, "site": "residual", "max": -1, "top": ["<b>"]}], "weights": [{"name": "<script>"}]}',
    ],
)
def test_a_spoilt_line_spoils_nothing(run: RunMaker, line: str) -> None:
    page = Reader()
    page.feed(write_page(write(run, [sample(1, 2.0)], line + "\n")).read_text())
    assert "Inside the model" in page.text and "script" not in page.seen and page.open == []


def test_without_telemetry_there_is_no_section(run: RunMaker) -> None:
    assert inside(read_history(run())) == ""
    only_weights: dict[str, Any] = {"step": 3, "weights": [{"name": "head", "std": 0.1}]}
    folder = run(name="weights")
    (folder / "telemetry.jsonl").write_text(json.dumps(only_weights) + "\n")
    assert "<img" not in inside(read_history(folder)) and "head" in inside(read_history(folder))
