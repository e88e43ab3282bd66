"""``analyze.py dynamics``: ratios from telemetry or from checkpoints, the curve of each layer, the early warning, the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megastab.analysis import dynamics_table
from megastab.analysis.command_line import parser_of
from megastab.analysis.dynamics import examine, remarks, verdict
from megastab.analysis.dynamics_forecast import forecast, seen_crossing
from megastab.analysis.dynamics_picture import draw
from megastab.analysis.dynamics_series import Architecture, Measurement, Place, Series, Source, of_checkpoints, of_run, places_of
from megastab.analysis.hidden_dynamics import Dynamics
from megastab.config.errors import UserError
from megastab.telemetry.activations import Place as Site
from megastab.telemetry.moments import Entry, Summary
from megastab.telemetry.sampler import Sample
from tests.unit.analysis.models import foreign_model, save_foreign, save_own
from tests.unit.model_generate.tiny import tiny_config, tiny_model

CURVES = [Dynamics(100.0, 0.5, 0.02, 1.0, 10.0), Dynamics(5000.0, 0.5, 0.004, 1.2, 20.0)]  # peaks 36.4 at 67, 1339 at 286
STEPS = list(range(5, 601, 5))
SHAPE = Architecture(2, 16, 2, 24)


def seen(ratio: float) -> Summary:
    return Summary((Entry(-0.5 * ratio, 0, 0, 0, 0),), 1.0, 0.5, 3.0, 3.0, 0)


def line(step: int, ratios: list[float]) -> str:
    """As the trainer writes it. The branches' ratios are others."""
    places = {Site(layer, "residual"): seen(ratio) for layer, ratio in enumerate(ratios)}
    places |= {Site(layer, "mlp"): seen(3.0) for layer in range(len(ratios))}
    return json.dumps(Sample(step, places).to_json(), allow_nan=False) + "\n"


def write_run(folder: Path, lines: list[str], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "telemetry.jsonl").write_text("".join(lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A run of 600 steps whose two layers follow ``CURVES``."""
    model = {"arch": "llama", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 24, "max_seq_len": 8}
    lines = [line(step, [float(curve.at(step)) for curve in CURVES]) for step in STEPS]
    return write_run(tmp_path / "planted", lines, {"megastab": {"model": model, "run": {"total_steps": 600}}})


def analyze(*words: Any) -> None:
    arguments = parser_of(None).parse_args([str(word) for word in words])
    arguments.run(arguments)


# -- where ratios come from --------------------------------------------------------------------------------------------


def test_telemetry_is_read(planted: Path) -> None:
    source = of_run(planted)
    assert (source.name, source.architecture, source.total_steps) == ("planted", SHAPE, 600)
    for series, curve in zip(source.series, CURVES, strict=True):
        assert series.steps == STEPS and series.ratios == pytest.approx(list(curve.at(STEPS)), rel=1e-12) and series.left_out == 0


def test_what_is_no_ratio_is_left_out_and_counted(tmp_path: Path) -> None:
    lines = [line(step, [float(step), 2.0]) for step in range(1, 11)]
    lines[2] = line(3, [math.nan, 2.0])  # null: the median was 0
    lines[4] = lines[4].replace('"max_over_median": 5.0', '"max_over_median": Infinity')
    lines += ["no JSON\n", '{"step": 12, "activations": "gone"}\n', '{"step": 13}\n', lines[9][:50]]
    first, second = of_run(write_run(tmp_path / "run", lines)).series
    assert first.steps == [1, 2, 4, 6, 7, 8, 9, 10] and first.left_out == 2
    assert second.steps == list(range(1, 11)) and second.left_out == 0
    layer = examine(Source("run", [first], None, 10), 0, 0.2)[0]
    assert "2 samples without a ratio" in remarks(layer, 10)


def test_after_a_rewind_the_later_line_counts(tmp_path: Path) -> None:
    lines = [line(step, [ratio]) for step, ratio in ((1, 1.0), (2, 2.0), (3, 30.0), (2, 2.5), (3, 3.0))]
    source = of_run(write_run(tmp_path / "run", lines))
    assert source.series[0].steps == [1, 2, 3] and source.series[0].ratios == [1.0, 2.5, 3.0]
    assert source.architecture is None and source.total_steps == 3


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, planted: Path) -> None:
    with pytest.raises(UserError, match="no run folder .*gone"):
        of_run(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl holds no step"):
        of_run(tmp_path / "empty")
    (planted / "telemetry.jsonl").write_text('{"step": 1, "weights": []}\n')
    with pytest.raises(UserError, match=r"no activations: .*megastab.telemetry.interval_steps .*megastab.telemetry.activations"):
        of_run(planted)


def test_checkpoints_are_measured_on_text(tmp_path: Path) -> None:
    """The ratio of every layer is what the hidden states themselves say; folders of two models are refused."""
    folders = {}
    for step in (10, 20, 30):
        model = foreign_model("gpt2")
        with torch.no_grad():
            model.transformer.wte.weight[:, 5] = float(step)  # type: ignore[union-attr, operator, index]
        folders[step] = save_foreign(tmp_path / f"step{step}", model=model)
    window_NS = torch.arange(24).view(2, 12)
    given = [str(tmp_path / "step20"), f"10={folders[10]}", f"30={folders[30]}"]
    source = of_checkpoints(places_of(given), Measurement(lambda _: window_NS))
    assert source.architecture == Architecture(3, 32, 4, 128) and source.total_steps == 30
    assert [series.steps for series in source.series] == [[10, 20, 30]] * 3
    from transformers import AutoModelForCausalLM

    for place, folder in enumerate(folders[step] for step in (10, 20, 30)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for layer in (0, 1):  # the last of hidden_states is behind the final norm
            sizes = model(window_NS, output_hidden_states=True).hidden_states[layer + 1].detach().abs().flatten()
            # the median comes from a histogram whose relative error is half a bin, 1/256 (telemetry.moments)
            assert source.series[layer].ratios[place] == pytest.approx(float(sizes.max() / sizes.median()), rel=1.5 / 256)
    other = save_foreign(tmp_path / "step40", model=foreign_model("gpt2", n_embd=16))
    with pytest.raises(UserError, match="not of one model: .*hidden_size=32.*hidden_size=16"):
        of_checkpoints([Place(10, folders[10]), Place(40, other)], Measurement(lambda _: window_NS))


def test_a_run_folder_stands_for_its_checkpoints(tmp_path: Path) -> None:
    run = save_own(tmp_path / "ours")
    assert places_of([str(run)]) == [Place(3, run / "checkpoints" / "step00000003")]
    source = of_checkpoints(places_of([str(run)]), Measurement(lambda _: torch.arange(16).view(2, 8)))
    model = tiny_config(run=tmp_path / "x").megastab.model
    assert source.architecture == Architecture(model.num_layers, model.hidden_size, model.num_heads, model.ffn_hidden_size)
    assert source.name == "ours" and len(source.series) == len(tiny_model().blocks) and source.series[0].steps == [3]


@pytest.mark.parametrize(("given", "why"), [(["here"], "give STEP=FOLDER"), (["x=here"], "give STEP"), (["5=a", "5=b"], "step 5 twice")])
def test_checkpoints_are_named_with_their_step(given: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        places_of(given)


# -- fits and the early warning ----------------------------------------------------------------------------------------


def test_planted_curves_are_found(planted: Path) -> None:
    layers = examine(of_run(planted), 0, 0.5)
    for layer, curve in zip(layers, CURVES, strict=True):
        assert layer.fit is not None and layer.fit.r2 > 0.99999  # noise-free: within 1e-3 of the spread
        assert layer.fit.curve.peak_step == pytest.approx(curve.peak_step, rel=0.01)
        assert layer.fit.curve.peak_height == pytest.approx(curve.peak_height, rel=0.005)
        assert "no" not in remarks(layer, 600).split() and "lowest" not in remarks(layer, 600)


def test_steps_before_the_start_are_left_out(planted: Path) -> None:
    (layer, _) = examine(of_run(planted), 100, 0.2)
    assert layer.series.steps[0] == 100 and layer.fit is not None and layer.fit.first_step == 100 and layer.fit.num_points == 101
    assert layer.early.until == 120 and layer.early.fit is None and "5 points" in layer.early.failure


def test_the_early_warning_sees_the_first_part_only(planted: Path) -> None:
    series = of_run(planted).series[1]
    told = forecast(series, 120)
    assert told.fit is not None and told.fit.last_step == 120 and told.fit.num_points == 24
    changed = Series(1, series.steps, [ratio if step <= 120 else 7.0 for step, ratio in zip(series.steps, series.ratios, strict=True)])
    again = forecast(changed, 120)
    assert again.fit == told.fit, "what came later does not reach it"
    assert told.outcome is not None and again.outcome is not None and told.outcome.num_points == 96
    assert told.outcome.error < 0.2 < 0.5 < again.outcome.error


def test_the_outcome_is_what_came() -> None:
    """Errors by hand: the curve is told to be 10 after the first part, where 20 and 40 came; it had stayed at 5."""
    steps = list(range(1, 31))
    ratios = [4.0, 5.0] * 5 + [20.0] * 10 + [40.0] * 10
    told = forecast(Series(0, steps, ratios), 10)
    assert told.fit is not None and told.outcome is not None
    values = told.fit.curve.at(steps[10:])
    errors = sorted(abs(value - came) / came for value, came in zip(values, ratios[10:], strict=True))
    assert told.outcome.error == pytest.approx((errors[9] + errors[10]) / 2)
    assert told.outcome.error_of_staying == pytest.approx((0.75 + 0.875) / 2), "the median of 5 4 5 4 5 is 5"
    assert (told.outcome.highest, told.outcome.highest_step, told.outcome.end) == (40.0, 21, 40.0)
    assert told.outcome.told_end == pytest.approx(float(values[-2:].mean()))


def test_crossing_a_thousand_is_told_and_seen(planted: Path) -> None:
    low, high = of_run(planted).series
    at = CURVES[1].first_crossing(1000.0)
    assert at is not None and seen_crossing(high) == 5 * math.ceil(at / 5) and seen_crossing(low) is None
    told = forecast(high, 60)  # ten steps before it happens
    assert at > 60 and told.crossing == pytest.approx(at, rel=0.05)
    assert forecast(low, 60).crossing is None


def test_a_warning_is_not_praised_where_it_was_no_better(planted: Path) -> None:
    good = forecast(of_run(planted).series[1], 300)
    bad = forecast(Series(0, list(range(1, 31)), [2.0 * i for i in range(10)] + [18.0] * 20), 10)
    assert "Do not rely" not in verdict([good]) and "1 of 1" in verdict([good])
    assert "0 of 1" in verdict([bad]) and "Do not rely on it here" in verdict([bad])
    assert "nothing to compare" in verdict([forecast(of_run(planted).series[1], 600)])


@pytest.mark.parametrize(
    ("ratios", "remark"),
    [
        ([7.0] * 20, "no fit: the ratio does not move"),
        ([1.0, 2.0], "no fit: 2 points"),
        ([float(Dynamics(300.0, 0.2, 0.1, 6.0, 10.0).at(i)) for i in range(120)], "falls from the start"),
        ([3 + 8 * math.log(i + 3) for i in range(40)], "still rising at the end"),
        ([20 - 15 * math.exp(-i / 9) * math.log(i / 5 + 1.5) for i in range(60)], "A < 0: a lowest point, no peak"),
        ([5 + (i * 7919 % 13) for i in range(60)], "R2 is low"),
    ],
)
def test_a_reader_is_told_what_the_row_is_worth(ratios: list[float], remark: str) -> None:
    layer = examine(Source("x", [Series(0, list(range(1, len(ratios) + 1)), ratios)], None, len(ratios)), 0, 1.0)[0]
    assert remark in remarks(layer, len(ratios))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_command_writes_everything(planted: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / f"table{suffix}", tmp_path / "out"
    analyze("dynamics", planted, "--output", out, "--table", table, "--first", "0.3")
    data = json.loads((out / "dynamics.json").read_text())
    assert data["architecture"] == SHAPE._asdict() and data["first"] == 0.3 and data["verdict"] in capsys.readouterr().out
    row = data["layers"][1]
    assert row["fit"]["peak_step"] == pytest.approx(CURVES[1].peak_step, rel=0.01) and row["early_warning"]["until_step"] == 180
    assert row["crosses_1000"]["seen_at"] and len(row["ratios"]) == len(STEPS)
    text = (out / "dynamics.md").read_text()
    assert text.count("\n| 1 ") == 2 and "up to 180 (30%)" in text
    assert (out / "dynamics.png").read_bytes()[1:4] == b"PNG"
    found = dynamics_table.read(table)
    assert [(row.run, row.layer, row.architecture) for row in found] == [("planted", 0, SHAPE), ("planted", 1, SHAPE)]
    assert found[1].values["peak_step"] == row["fit"]["peak_step"] and found[1].values["points"] == 120, "to the last bit"
    with pytest.raises(UserError, match="holds a run 'planted' already: .*--run-id"):
        analyze("dynamics", planted, "--table", table)
    analyze("dynamics", planted, "--table", table, "--run-id", "again")
    assert [row.run for row in dynamics_table.read(table)] == ["planted"] * 2 + ["again"] * 2


def test_the_picture_has_a_panel_a_layer(planted: Path) -> None:
    figure = draw("planted", examine(of_run(planted), 0, 0.2))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["layer 0", "layer 1"]
    assert list(shown[0].lines[0].get_xdata()) == STEPS
    wide = Source("x", [Series(i, STEPS, [height + step for step in STEPS]) for i, height in enumerate((500.0, 1.0))], None, 600)
    assert [axes.get_yscale() for axes in draw("x", examine(wide, 0, 0.2)).axes] == ["linear", "log"], "a factor of 2, one of 100"
    many = examine(Source("x", [Series(i, [1, 2], [1.0, 2.0]) for i in range(50)], None, 2), 0, 0.2)
    titles = [axes.get_title(loc="left") for axes in draw("x", many).axes]
    assert len(titles) == 24 and titles[0] == "layer 0: no fit" and titles[-1] == "layer 49: no fit"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give a run folder .*or --checkpoints"),
        (["here", "--checkpoints", "1=there"], "give a run folder .*or --checkpoints"),
        (["--checkpoints", "1=there"], "give --text"),
        (["here", "--first", "0"], "--first 0 is a share"),
        (["here", "--first", "1.5"], "--first 1.5 is a share"),
    ],
)
def test_bad_words_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        analyze("dynamics", *words)


def test_checkpoints_from_the_command_line(tmp_path: Path) -> None:
    save_foreign(tmp_path / "step1", "llama")
    (tmp_path / "text.txt").write_text("hello world, " * 20)
    how = ("--text", tmp_path / "text.txt", "--seq-len", 16, "--windows", 3, "--output", tmp_path)
    analyze("dynamics", "--checkpoints", tmp_path / "step1", *how)
    data = json.loads((tmp_path / "dynamics.json").read_text())
    assert data["architecture"]["ffn_hidden_size"] == 64 and [layer["steps"] for layer in data["layers"]] == [[1]] * 3
    assert data["layers"][0]["remark"] == "no fit: 1 points: five parameters need at least 8" and data["layers"][0]["fit"] is None


def test_an_unknown_architecture_is_not_added(planted: Path, tmp_path: Path) -> None:
    (planted / "config.json").unlink()
    with pytest.raises(UserError, match="architecture of planted is not known"):
        analyze("dynamics", planted, "--table", tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()


GOOD = dict(zip(dynamics_table.COLUMNS, ["r", 0, *SHAPE, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9], strict=True))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"A": None}, "line 1 lacks A"),
        ({"gamma": "fast"}, "line 1: could not convert"),
        ({"K": math.inf}, "line 1: K = inf is no number"),
        ({"layer": 0.5}, "line 1: layer = 0.5 is no whole number"),
        ({"layer": 2}, "line 1: layer = 2, but num_layers = 2"),
        ({"hidden_size": 0}, "line 1: hidden_size = 0 must be above 0"),
        ({"lambda": -1.0}, "line 1: lambda = -1.0 must be above 0"),
    ],
)
def test_a_bad_table_is_told_by_line(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(UserError, match=why):
        dynamics_table.read(tmp_path / "t.jsonl")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must end in .csv or .jsonl"):
        dynamics_table.append(tmp_path / "t.txt", "r", SHAPE, {})
    with pytest.raises(UserError, match="cannot be read .*make one with"):
        dynamics_table.read(tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text("{}\nno\n")
    with pytest.raises(UserError, match="line 2 is no JSON"):
        dynamics_table.read(tmp_path / "t.jsonl")
    (tmp_path / "t.csv").write_text(",".join(GOOD) + "\n" + ",".join(map(str, GOOD.values())))  # the last line without its end
    fit = dict.fromkeys(dynamics_table.COLUMNS[6:-1], 1.0) | {"points": 9}
    dynamics_table.append(tmp_path / "t.csv", "other", SHAPE, {1: fit})
    assert [(row.run, row.layer) for row in dynamics_table.read(tmp_path / "t.csv")] == [("r", 0), ("other", 1)]
