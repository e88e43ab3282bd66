"""The figure ``orthoadam``: its arithmetic, and that each contestant does what its name says. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

from megastab.config.load import load_config
from megastab.optim import row_op
from megastab.report.bench import ortho_step, orthoadam_contestants
from megastab.report.bench.cases import Options, Spec
from megastab.report.bench.jobs import Reply
from megastab.report.bench.orthoadam import dense_rows, rows
from megastab.report.bench.orthoadam_contestants import BETAS, DECAY, EPS, LEARNING_RATE, DenseHaar, measure, step_of, weights_of

SECONDS = {"fused": [0.01, 0.02, 0.03], "foreach": [0.06, 0.08, 0.04], "op": [0.034, 0.02, 0.05], "torch": [0.12, 0.2, 0.3]}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(row_op.SWITCH, "1")  # so that what a contestant sets is taken back


def test_rows_of_a_width() -> None:
    found = {row.case: row for row in rows(512, SECONDS)}
    wanted = {
        "[2048, 512] op over fused AdamW": (1.7, 1.5, "MISSED"),
        "[2048, 512] op over foreach AdamW": (0.034 / 0.06, 1.0, "ok"),
        "[2048, 512] torch over foreach AdamW": (0.2 / 0.06, 3.0, "MISSED"),
    }
    assert list(found) == list(wanted)
    for case, (value, bound, verdict) in wanted.items():
        row = found[case]
        assert (row.figure, row.bound, row.verdict) == ("orthoadam", bound, verdict), case
        assert row.value == pytest.approx(value), case
    assert "34.00 ms, AdamW 20.00 ms; median of pairwise ratios 1.667" in found["[2048, 512] op over fused AdamW"].detail
    assert next(iter(rows(768, SECONDS))).verdict == "ok", "1.8 at m * 2^k"


def test_rows_without_the_op() -> None:
    without = {who: series for who, series in SECONDS.items() if who != "op"}
    assert [row.verdict for row in rows(512, without)] == ["failed", "failed", "MISSED"]
    assert [row.verdict for row in dense_rows({"dense": [1.0], "torch": [0.1]})] == ["failed", ""]


def test_dense_is_so_many_times_slower() -> None:
    fast, slow = dense_rows({"dense": [1.0, 3.0, 2.0], "op": [0.1, 0.2, 0.1], "torch": [0.5, 0.5, 0.5]})
    assert (fast.value, fast.verdict, slow.value, slow.verdict) == (pytest.approx(20.0), "ok", pytest.approx(4.0), "")


def test_dense_haar_is_the_rotated_adam() -> None:
    weights = weights_of(6, 4)
    dense, gradient, before = DenseHaar(weights), weights.grad, weights.detach().double()
    assert gradient is not None
    left, right = dense.left.double(), dense.right.double()
    m = v = torch.zeros(6, 4, dtype=torch.float64)
    for step in (1, 2):
        dense.step()
        r = left @ gradient.double() @ right.t()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r * r
        u = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        before = before * (1 - LEARNING_RATE * DECAY) - LEARNING_RATE * left.t() @ u @ right
    assert torch.allclose(weights.detach().double(), before, atol=1e-6)


def test_each_contestant_steps_by_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(row_op, "takes", lambda *_: bool(taken.append(row_op.os.environ[row_op.SWITCH] == "1")))
    for who in ("op", "torch", "op"):
        step_of(who, weights_of(3, 16))()
    assert taken == [True, False, True]


def test_whole_step_is_that_of_two_runs_alike_but_for_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        def __init__(self, spec: Spec, threads: int):
            self.config = load_config(spec.source())

        def __enter__(self) -> Job:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def step(self) -> Reply:
            config = self.config
            assert config.global_batch * config.megastab.model.max_seq_len == 4096 and config.megastab.model.hidden_size == 512
            return Reply([1.1 if config.optimizer_type == "OrthoAdam" else 1.0], cpu_seconds=[1.0])

    monkeypatch.setattr(ortho_step, "Job", Job)
    (row,) = ortho_step.ortho_step(Options())
    assert (row.value, row.verdict) == (pytest.approx(1.1), "MISSED") and "1100 ms, AdamW 1000 ms" in row.detail
    assert "pairwise ratios 1.100, by CPU time 1.000" in row.detail


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(row_op, "agree", lambda: "")
    monkeypatch.setattr(row_op, "active", lambda: False)
    monkeypatch.setattr(orthoadam_contestants, "step_of", lambda who, _: lambda: order.append(who))
    found = measure(2, 16, 3, ["fused", "op", "torch"])
    assert order == ["fused", "torch"] * 5 and {who: len(series) for who, series in found.items()} == {"fused": 3, "torch": 3}
