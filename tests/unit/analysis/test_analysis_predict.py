"""``analyze.py predict``: parameters from the architecture, scored on runs left out."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastab.analysis import dynamics_regression, dynamics_table
from megastab.analysis.command_line import parser_of
from megastab.analysis.dynamics_regression import (
    FEATURES,
    TARGETS,
    Score,
    check_runs,
    features,
    learn,
    original,
    predict,
    regressed,
    target_of,
)
from megastab.analysis.dynamics_series import Architecture
from megastab.analysis.dynamics_table import Row
from megastab.analysis.predict import remarks
from megastab.config.errors import UserError

CONFIG = Path(__file__).parents[3] / "docs" / "experiments" / "llama_2m.json"


def row(run: str, layer: int, shape: Architecture, **values: float) -> Row:
    """Unless said otherwise: a peak of 50 at step 100."""
    plain = {
        "A": 100.0,
        "lambda": 0.5,
        "gamma": 0.01,
        "t0": 1.0,
        "K": 10.0,
        "peak_step": 100.0,
        "peak_ratio": 50.0,
        "r2": 0.9,
        "points": 20.0,
    }
    return Row(run, layer, shape, {**plain, **values})


def shape_of(i: int) -> Architecture:
    return Architecture(4 + i % 3, 64 * (i + 1), 4, 256 * (i + 1))


def lawful(num_runs: int = 10) -> list[Row]:
    """K = d / 64 * (1 + l / L): a law of the architecture; the rest does not vary."""
    rows = []
    for i in range(num_runs):
        shape = shape_of(i)
        for layer in range(shape.num_layers):
            rows.append(row(f"run{i}", layer, shape, K=shape.hidden_size / 64 * (1 + (layer + 1) / shape.num_layers)))
    return rows


def whimsical(num_runs: int = 10) -> list[Row]:
    """K is each run's own number, drawn at random, and nearly the same in all its layers."""
    draw = np.random.default_rng(3)
    rows = []
    for i in range(num_runs):
        own = float(np.exp(2 * draw.standard_normal()))
        rows += [row(f"run{i}", layer, shape_of(i), K=own * (1 + 0.01 * layer)) for layer in range(shape_of(i).num_layers)]
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    for run in dict.fromkeys(each.run for each in rows):
        layers = {each.layer: each.values for each in rows if each.run == run}
        dynamics_table.append(path, run, next(each.architecture for each in rows if each.run == run), layers)
    return path


def analyze(*words: Any) -> None:
    arguments = parser_of(None).parse_args([str(word) for word in words])
    arguments.run(arguments)


def test_the_features_are_the_papers() -> None:
    told = dict(zip(FEATURES, features(Architecture(8, 64, 4, 256), 1), strict=True))
    by_hand = {"l/L": 0.25, "(l/L)^2": 0.0625, "(l/L)^3": 0.015625, "sqrt(l/L)": 0.5, "heads/d": 0.0625, "d_ff/d": 4.0, "d/L": 8.0}
    assert told == by_hand | {"heads/L": 0.5, "log d": math.log(64), "l L": 16.0}


@pytest.mark.parametrize("target", TARGETS)
def test_a_parameter_comes_back(target: str) -> None:
    for value in (1e-4, 0.7, 3000.0, *((-5.0, 0.0) if target in ("A", "K") else ())):
        assert original(target, regressed(target, value)) == pytest.approx(value, rel=1e-12)
    assert target in ("A", "K") or math.isnan(regressed(target, -1.0))
    assert original(target, 1e5) == math.inf


def test_a_run_is_never_on_both_sides() -> None:
    """Where only the run explains it, leaving out layers looks like knowledge, and leaving out runs shows there is none."""
    found = learn(whimsical(), "K")
    assert found.num_runs == 10 and found.num_rows == len(whimsical())
    forest = found.scores["random forest"]
    assert forest.by_layer > 0.8 and forest.by_run < 0.3
    assert max(score.by_run for name, score in found.scores.items() if name != "mean") < 0.3
    assert found.scores["mean"].by_run < 0, "a mean that has not seen the run is worse than one that has"


def test_what_follows_from_the_architecture_is_learned() -> None:
    rows = lawful()
    found = learn(rows, "K")
    assert found.best in ("ridge", "random forest", "gradient boosting") and found.scores[found.best].by_run > 0.8
    unseen = Architecture(5, 64 * 5 + 32, 4, 1408)
    told = predict(rows, found, unseen)
    assert len(told) == 5
    off = [abs(math.log(middle / (5.5 * (1 + (layer + 1) / 5)))) for layer, (_, middle, _) in enumerate(told)]
    assert max(off) < 0.3, "within a third, from widths 64 apart"
    assert all(low < middle < high for low, middle, high in told)
    spread = np.percentile(abs(found.scores[found.best].residuals), 80)
    low, middle, high = (math.log1p(value) for value in told[0])
    assert high - middle == pytest.approx(spread) and middle - low == pytest.approx(spread)


def test_what_cannot_be_learned_is_the_mean() -> None:
    """Every run is the opposite of those next to it in width, so that what these say is wrong."""
    shapes = [Architecture(4, 64 * (i + 1), 4, 256 * (i + 1)) for i in range(10)]
    rows = [row(f"run{i}", layer, shape, K=(1.0, 100.0)[i % 2]) for i, shape in enumerate(shapes) for layer in range(4)]
    found = learn(rows, "K")
    assert found.best == "mean" and max(score.by_run for score in found.scores.values()) <= 0
    mean = float(np.mean([math.log1p(each.values["K"]) for each in rows]))
    assert [math.log1p(middle) for _, middle, _ in predict(rows, found, Architecture(3, 64, 4, 256))] == pytest.approx([mean] * 3)


@pytest.mark.parametrize(("ridge", "best"), [(-0.1, "mean"), (0.1, "ridge")])
def test_better_than_the_mean_is_not_enough(ridge: float, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the other runs is below 0 itself: a model that is less so knows nothing yet."""
    scores = {"mean": -0.5, "ridge": ridge, "random forest": -0.2, "gradient boosting": -0.3}
    monkeypatch.setattr(dynamics_regression, "_score", lambda name, x, y, runs: Score(scores[name], 0.9, 0 * y))
    assert learn(lawful(3), "K").best == best


def test_layers_without_a_peak_teach_no_peak() -> None:
    rows = lawful(4)
    rows[0] = rows[0]._replace(values={**rows[0].values, "A": -1.0})
    rows[1] = rows[1]._replace(values={**rows[1].values, "peak_step": -3.0})
    assert target_of(rows[0], "peak_step") is None and target_of(rows[1], "peak_ratio") is None
    assert target_of(rows[0], "K") is not None and target_of(rows[0], "A") == pytest.approx(-math.log(2))
    assert learn(rows, "peak_step").num_rows == len(rows) - 2 and learn(rows, "K").num_rows == len(rows)
    none = [each._replace(values={**each.values, "A": -1.0}) for each in rows if each.run != "run0"] + [x for x in rows if x.run == "run0"]
    assert "layers of 1 runs only" in learn(none, "peak_step").failure


def test_two_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds layers of 2 runs, but at least 3 are needed"):
        analyze("predict", "--table", write(tmp_path / "two.csv", lawful(2)))
    poor = [each._replace(values={**each.values, "r2": 0.2 if each.run == "run2" else 0.9}) for each in lawful(3)]
    with pytest.raises(UserError, match=r"R2 at least 0.5.* holds layers of 2 runs"):
        analyze("predict", "--table", write(tmp_path / "poor.csv", poor))
    check_runs(dynamics_table.read(tmp_path / "poor.csv"), "all three are enough")


def test_the_command_predicts_with_a_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    analyze("predict", "--table", write(tmp_path / "t.jsonl", lawful(4)), "--config", CONFIG, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert (
        "not to be trusted: for a new run only 'by run' counts" in printed and "ridge, by run" in printed and "ridge, by layer" in printed
    )
    data = json.loads((tmp_path / "predict.json").read_text())
    assert [each["target"] for each in data["targets"]] == list(TARGETS)
    models = data["targets"][TARGETS.index("K")]["models"]
    assert set(models) == {"mean", "ridge", "random forest", "gradient boosting"} and models["ridge"].keys() == {
        "r2_by_run",
        "r2_by_layer_leaky",
    }
    assert data["prediction"]["architecture"] == {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 384}
    told = data["prediction"]["low_middle_high"]
    assert told.keys() == set(TARGETS) and all(len(rows) == 6 for rows in told.values())
    assert told["gamma"][0] == pytest.approx([0.01] * 3), "what does not vary is known"
    assert (tmp_path / "predict.md").read_text().count("\n| 5 ") == 1


def test_what_the_table_cannot_support_is_told() -> None:
    rows = lawful(4)
    assert remarks(rows, 3, 0.5) == [f"{len(rows)} layers in 4 runs of 4 architectures; 3 more, fitted worse than R2 0.5, are left out."]
    twins = [each._replace(architecture=shape_of(0)) if each.run == "run1" else each for each in rows]
    assert any("share an architecture" in text for text in remarks(twins, 0, 0.5))
    same = [each._replace(architecture=shape_of(0)) for each in rows]
    assert any("nothing but the depth" in text for text in remarks(same, 0, 0.5))


def test_a_config_without_a_model_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", lawful(3))
    (tmp_path / "c.json").write_text('{"megastab": {"model": {"arch": "llama"}}}')
    with pytest.raises(UserError, match="c.json has no megastab.model that can be read"):
        analyze("predict", "--table", table, "--config", tmp_path / "c.json")
    with pytest.raises(UserError, match="gone.json"):
        analyze("predict", "--table", table, "--config", tmp_path / "gone.json")


def test_without_scikit_learn_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install megastab\[analysis\]"):
        learn(lawful(3), "K")
