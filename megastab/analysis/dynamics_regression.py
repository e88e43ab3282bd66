"""The curve's parameters from the architecture (arXiv 2508.03616), and how much of that survives a run never seen.

Layers of one run resemble each other, and know it: a regression that sees some of them recognises the run and repeats it. So the score that
counts leaves out whole runs (``GroupKFold``); the paper's, which leaves out layers, is computed beside it to show the difference.

Differs: the paper splits by layer, log1p's the parameters and takes Yeo-Johnson for K. Here lambda, gamma, t0 and the peak are regressed as
logarithms, and A and K, which may be negative, as sign(y) log(1 + |y|), so that nothing is fitted before the folds are cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megastab.analysis.dynamics_series import Architecture
from megastab.analysis.dynamics_table import Row
from megastab.analysis.hidden_dynamics import Array, missing
from megastab.config.errors import UserError

MIN_RUNS, MAX_FOLDS, TREES, SEED = 3, 5, 60, 0
FEATURES = ("l/L", "(l/L)^2", "(l/L)^3", "sqrt(l/L)", "heads/d", "d_ff/d", "d/L", "heads/L", "log d", "l L")
TARGETS = ("A", "lambda", "gamma", "t0", "K", "peak_step", "peak_ratio")
SIGNED = ("A", "K")
MODELS = ("mean", "ridge", "random forest", "gradient boosting")
"""``mean`` looks at no feature: what the others have to beat."""
WITHIN = 80  # per cent of the layers of runs left out lie within the spread


def features(architecture: Architecture, layer: int) -> list[float]:
    """``FEATURES`` of a 0-based layer; l counts from 1."""
    num_layers, width, heads, ffn = architecture
    depth, ratio = layer + 1, (layer + 1) / num_layers
    shape = [heads / width, ffn / width, width / num_layers, heads / num_layers, math.log(width), depth * num_layers]
    return [ratio, ratio**2, ratio**3, math.sqrt(ratio), *shape]


def regressed(target: str, value: float) -> float:
    """A parameter on the scale it is regressed on; NaN where it has none (a logarithm of what is not above 0)."""
    if target in SIGNED:
        return math.copysign(math.log1p(abs(value)), value)
    return math.log(value) if value > 0 else math.nan


def original(target: str, value: float) -> float:
    """Back."""
    try:
        return math.copysign(math.expm1(abs(value)), value) if target in SIGNED else math.exp(value)
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclass(frozen=True)
class Score:
    """Of one model on one target."""

    by_run: float
    """R2 on layers of runs left out; may be far below 0."""
    by_layer: float
    """R2 on layers left out of runs that were seen: leaky."""
    residuals: Array
    """Regressed minus predicted, of runs left out."""


@dataclass(frozen=True)
class Learned:
    """One target."""

    target: str
    num_rows: int
    num_runs: int
    scores: dict[str, Score]
    """By model."""
    best: str
    """By ``by_run``; ``mean`` where none is above 0 and above it. Chosen and scored on the same folds, which flatters it a little."""
    failure: str = ""
    """Why there is none."""


def learn(rows: Sequence[Row], target: str) -> Learned:
    """Cross-validate all models on one target; rows on which it is not defined (no peak) are left out."""
    kept = [row for row in rows if target_of(row, target) is not None]
    num_runs = len({row.run for row in kept})
    if num_runs < MIN_RUNS:
        return Learned(target, len(kept), num_runs, {}, "", f"defined in layers of {num_runs} runs only; needs {MIN_RUNS}")
    x, y, runs = matrix(kept, target)
    scores = {name: _score(name, x, y, runs) for name in MODELS}
    best = max(MODELS, key=lambda name: scores[name].by_run)
    return Learned(target, len(kept), num_runs, scores, best if scores[best].by_run > 0 else "mean")


def predict(rows: Sequence[Row], learned: Learned, architecture: Architecture) -> list[tuple[float, float, float]]:
    """(low, middle, high) of each layer of an architecture, from the best model trained on all rows.

    The spread holds ``WITHIN`` per cent of what the model was off by on runs it had not seen, in either direction.
    """
    kept = [row for row in rows if target_of(row, learned.target) is not None]
    x, y, _ = matrix(kept, learned.target)
    model = _made(learned.best).fit(x, y)
    told = model.predict(np.array([features(architecture, layer) for layer in range(architecture.num_layers)]))
    off = float(np.percentile(abs(learned.scores[learned.best].residuals), WITHIN))
    low, middle, high = ([original(learned.target, float(t)) for t in told + shift] for shift in (-off, 0.0, off))
    return list(zip(low, middle, high, strict=True))


def target_of(row: Row, target: str) -> float | None:
    """On the scale of the regression; None where the row has no such thing."""
    if target.startswith("peak") and (row.values["A"] <= 0 or row.values["peak_step"] <= 0):
        return None
    value = regressed(target, row.values[target])
    return value if math.isfinite(value) else None


def matrix(rows: Sequence[Row], target: str) -> tuple[Array, Array, list[str]]:
    """([rows, features], [rows], run of each row); ``rows`` in which the target is defined."""
    x = np.array([features(row.architecture, row.layer) for row in rows])
    return x, np.array([target_of(row, target) for row in rows], np.float64), [row.run for row in rows]


def _score(name: str, x: Array, y: Array, runs: list[str]) -> Score:
    selection = _sklearn("model_selection")
    by_run = selection.GroupKFold(min(MAX_FOLDS, len(set(runs))))
    by_layer = selection.KFold(min(MAX_FOLDS, len(y)), shuffle=True, random_state=SEED)
    apart = selection.cross_val_predict(_made(name), x, y, groups=runs, cv=by_run)
    leaky = selection.cross_val_predict(_made(name), x, y, cv=by_layer)
    return Score(_r2(y, apart), _r2(y, leaky), y - apart)


def _r2(y: Array, told: Array) -> float:
    """Over all folds together; NaN where the target does not vary."""
    total = float(np.sum((y - y.mean()) ** 2))
    return 1 - float(np.sum((y - told) ** 2)) / total if total > 0 else math.nan


def _made(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "mean": lambda: _sklearn("dummy").DummyRegressor(),
        "ridge": _ridge,
        "random forest": lambda: _sklearn("ensemble").RandomForestRegressor(TREES, random_state=SEED),
        "gradient boosting": lambda: _sklearn("ensemble").GradientBoostingRegressor(max_depth=2, random_state=SEED),
    }
    return makers[name]()


def _ridge() -> Any:
    """Its strength from within the training folds."""
    scaler = _sklearn("preprocessing").StandardScaler()
    return _sklearn("pipeline").make_pipeline(scaler, _sklearn("linear_model").RidgeCV(np.logspace(-3, 3, 13)))


def _sklearn(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise missing("scikit-learn", error) from error


def check_runs(rows: Sequence[Row], name: str) -> None:
    """Refuse a table from which nothing can be left out."""
    runs = {row.run for row in rows}
    if len(runs) < MIN_RUNS:
        raise UserError(
            f"{name} holds layers of {len(runs)} run{'s' * (len(runs) != 1)}, but at least {MIN_RUNS} are needed: a run is scored by what "
            f"the others say of it, and two points are a line through anything; add runs with analyze.py dynamics RUN --table"
        )
