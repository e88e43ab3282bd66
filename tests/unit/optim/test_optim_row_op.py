"""The C++ row op: torch's results to rounding, the same bits for a row wherever it lies, one build, and never an error."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megastab.optim import row_op
from megastab.optim.rotation import rotation_of, walsh_hadamard
from megastab.optim.row_step import Pace, Views, step_rows
from tests.ranks import run_ranks

WIDTHS = (2, 3, 16, 17, 20, 48, 96, 256, 512, 768, 1408, 1536, 2560, 4096, 16384)
STEPS = 3
each_width = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture
def op() -> None:
    """The op in use; the first test builds it, unless an earlier run has."""
    said = row_op.agree()
    if "built C++ op" not in said:
        assert shutil.which(os.environ.get("CXX", "c++")) is None, f"there is a compiler, and yet: {said}"
        pytest.skip("no compiler here: torch does the work")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the op yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    row_op._load.cache_clear()
    yield tmp_path
    row_op._load.cache_clear()


def numbers(rows: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(rows, width, generator=generator) for _ in range(1 + STEPS)]


def pace(step: int) -> Pace:
    """eps is large: near coordinates of zero Adam lifts rounding to a part of lr, in either path."""
    return Pace(1e-2, 0.9, 0.95, 1e-2, step, 0.1)


def steps(given: list[torch.Tensor], width: int, first: int = 0) -> list[torch.Tensor]:
    """Weights and moments after a few steps."""
    weights, *gradients = given
    rotation = rotation_of("hadamard", 1, "a", width)
    out = [weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)]
    for step, gradient in enumerate(gradients, 1):
        step_rows(Views(out[0], gradient, *out[1:]), rotation, first, pace(step))
    return out


def exactly(given: list[torch.Tensor], width: int) -> list[torch.Tensor]:
    """The same in fp64 with Q as a matrix."""
    rotation, at = rotation_of("hadamard", 1, "a", width), pace(1)
    assert rotation.left is not None and rotation.signs is not None
    q = torch.kron(rotation.left.double(), rotation.right.double()) * rotation.signs * (width & -width) ** -0.5
    w = given[0].double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(given[1:], 1):
        r = gradient.double() @ q.t()
        m, v = at.beta1 * m + (1 - at.beta1) * r, at.beta2 * v + (1 - at.beta2) * r * r
        u = (m / (1 - at.beta1**t)) / ((v / (1 - at.beta2**t)).sqrt() + at.eps)
        w = w * (1 - at.lr * at.decay) - at.lr * u @ q
    return [w, m, v]


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    update = row_op.step
    monkeypatch.setattr(row_op, "step", lambda rows, *rest: (calls.append(rows[0].shape[0]), update(rows, *rest))[1])
    return calls


@each_width
def test_op_is_the_torch_path_to_rounding(width: int, op: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, given = counted(monkeypatch), numbers(5, width)
    mine = steps(given, width)
    row_op.forget()
    theirs = steps(given, width)
    assert calls == [5] * STEPS
    for a, b, bound in zip(mine, theirs, (5e-7, 5e-7, 1e-6), strict=True):  # a square has twice the relative error
        assert apart(a, b) < bound


def test_rows_of_more_passes_than_any_model_needs(op: None) -> None:
    given = numbers(2, 1 << 17)
    mine = steps(given, 1 << 17)
    row_op.forget()
    assert max(apart(a, b) for a, b in zip(mine, steps(given, 1 << 17), strict=True)) < 1e-6  # 17 sums in a row


@pytest.mark.parametrize("width", [17, 20, 48, 512, 768, 1408])
def test_op_is_a_dense_reference_to_rounding(width: int, op: None) -> None:
    given = numbers(3, width)
    for a, b, bound in zip(steps(given, width), exactly(given, width), (5e-7, 5e-7, 1e-6), strict=True):
        assert apart(a, b) < bound


@each_width
def test_bits_of_a_row_do_not_depend_on_its_neighbours(width: int, op: None) -> None:
    given = numbers(7, width)
    whole = steps(given, width)
    for here in (slice(0, 1), slice(3, 4), slice(6, 7), slice(2, 6)):
        part = steps([t[here].clone() for t in given], width, here.start)
        assert all(torch.equal(a, b[here]) for a, b in zip(part, whole, strict=True)), here


def test_bits_do_not_depend_on_the_number_of_threads(op: None) -> None:
    given, before, found = numbers(201, 768), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(steps(given, 768))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("width", [20, 48, 512, 768])
@pytest.mark.parametrize("offset", [1, 3, 64])
def test_rows_may_begin_anywhere_and_nothing_beside_them_is_touched(width: int, offset: int, op: None) -> None:
    given = numbers(4, width)
    whole = steps(given, width)
    flats = [torch.full((offset + 4 * width + 7,), 9.0) for _ in range(4)]
    views = Views(*flats).rows(offset, 4, width)
    for tensor, start in zip((views.weights, views.mean, views.square), (given[0], 0.0, 0.0), strict=True):
        tensor.copy_(torch.as_tensor(start))
    for step, gradient in enumerate(given[1:], 1):
        views.gradient.copy_(gradient)
        step_rows(views, rotation_of("hadamard", 1, "a", width), 0, pace(step))
    assert all(torch.equal(a, b) for a, b in zip((views.weights, views.mean, views.square), whole, strict=True))
    assert torch.equal(views.gradient, given[-1]), "the gradient is read only"
    for flat in flats:
        assert torch.equal(torch.cat([flat[:offset], flat[offset + 4 * width :]]), torch.full((offset + 7,), 9.0))


@pytest.mark.parametrize(("processor", "is_same"), [("haswell", True), ("x86-64", False)], ids=["AVX2", "plain"])
def test_other_vector_widths(processor: str, is_same: bool, op: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 and AVX-512 give the same bits; without fused products the last bit may differ."""
    if "AVX" not in row_op.describe():
        pytest.skip("a processor without AVX2")
    expected = [steps(numbers(3, width), width) for width in WIDTHS]
    monkeypatch.setattr(row_op, "FLAGS", tuple(flag for flag in row_op.FLAGS if "-march" not in flag) + (f"-march={processor}",))
    row_op._load.cache_clear()
    try:
        assert ("(AVX2)" if is_same else "(plain)") in row_op.agree()
        for width, theirs in zip(WIDTHS, expected, strict=True):
            mine = steps(numbers(3, width), width)
            if is_same:
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), width
            assert max(apart(a, b) for a, b in zip(mine, theirs, strict=True)) < 5e-7, width
    finally:
        row_op._load.cache_clear()


def test_coordinates_that_cancel_are_exactly_zero(op: None) -> None:
    """As in torch: the scale (here not a power of two) comes after the sums."""
    rows, rotation = (
        torch.randint(-2, 3, (9, 512), generator=torch.Generator().manual_seed(0)).float(),
        rotation_of("hadamard", 0, "a", 512),
    )
    assert rotation.signs is not None
    exact = (rows.double() * rotation.signs @ walsh_hadamard(512).double()).float() * rotation.scale
    views = [torch.zeros(9, 512) for _ in range(3)]
    step_rows(Views(views[0], rows, *views[1:]), rotation, 0, Pace(1.0, 0.0, 0.0, 1e-8, 1))
    assert int((exact == 0).sum()) > 50 and torch.equal(views[1], exact)


def test_zero_gradient_and_not_a_number(op: None) -> None:
    given = numbers(4, 48)
    given[1][1, 7], given[1][2] = float("nan"), 0.0
    found = steps(given[:2], 48)
    assert found[0][1].isnan().all() and not found[0][[0, 2, 3]].isnan().any(), "a row's trouble stays in the row"
    assert torch.allclose(found[0][2], given[0][2] * (1 - 1e-2 * 0.1), rtol=1e-6)


def test_only_hadamard_rows_are_taken(op: None) -> None:
    weights = torch.zeros(2, 20)
    assert row_op.takes(rotation_of("hadamard", 0, "a", 20), weights)
    assert not row_op.takes(rotation_of("haar", 0, "a", 20), weights)
    assert not row_op.takes(rotation_of("hadamard", 0, "a", 20), weights.double())
    with pytest.raises(ValueError, match="contiguous fp32 rows of 20"):
        row_op.step([torch.zeros(20, 2).t()] * 4, rotation_of("hadamard", 0, "a", 20), (0.9, 0.95), 1e-8, 1, 1e-3, 0.0)


def test_torch_does_the_work_until_the_ranks_have_agreed() -> None:
    assert not row_op.active() and row_op.describe() == "in pure torch"
    assert not row_op.takes(rotation_of("hadamard", 0, "a", 20), torch.zeros(2, 20))


def test_agreement_for_other_rows_revokes_nothing(op: None) -> None:
    assert row_op.agree(is_of_use=False) == "in pure torch" and row_op.active()


# -- without it ----------------------------------------------------------------------------------------------------------


def test_switch_turns_it_off(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(row_op.SWITCH, "0")
    assert row_op.agree() == "in pure torch" and not row_op.active()
    steps(numbers(2, 48), 48)
    assert not (fresh / "cache").exists() and not caplog.records, "neither built nor complained"


def failing_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler = folder / "no-compiler"
    compiler.write_text("#!/bin/sh\necho 'row_op.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))


@pytest.mark.parametrize("trouble", ["compiler", "source", "read-only", "too slow"])
def test_without_a_build_one_line_says_why_and_torch_does_the_work(
    trouble: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = steps(numbers(2, 48), 48)
    if trouble == "compiler":
        failing_compiler(monkeypatch, fresh)
    elif trouble == "source":
        (fresh / "row_op.cpp").write_text("int row_op_said(")
        monkeypatch.setattr(row_op, "SOURCE", fresh / "row_op.cpp")
    elif trouble == "read-only":
        (fresh / "cache").write_text("a file where the folder should be")  # root may write to any folder
    else:
        monkeypatch.setattr(row_op, "LIMIT_SECONDS", 0.0)
        monkeypatch.setattr(row_op, "BUILD", "import time; time.sleep(60)")
    with caplog.at_level(logging.WARNING, "megastab"):
        assert row_op.agree() == row_op.agree() == "in pure torch"
        found = steps(numbers(2, 48), 48)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (record,) = caplog.records
    said = {"compiler": "no-compiler|no such thing", "source": "error: ", "read-only": "cache", "too slow": "took more than"}[trouble]
    assert "steps rows in pure torch" in record.message and any(part in record.message for part in said.split("|")), record.message
    left = list((fresh / "cache" / "megastab").iterdir()) if trouble != "read-only" else []
    assert all(path.suffix == ".lock" for path in left), "no half of a build"


BUILDER = """
import sys, time
from pathlib import Path
from megastab.optim import row_op
row_op.BUILD = "import sys, time; open(sys.argv[2] + '/row_op.so', 'w').close(); open(sys.argv[-1], 'a').write('built '); time.sleep(0.5)"
row_op.FLAGS = (*row_op.FLAGS, sys.argv[1])
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
print(row_op.built())
"""


def test_processes_that_build_at_once_end_with_one_build(fresh: Path) -> None:
    """What is built is a stand-in: the lock is under test, and a compiler's seconds are not needed for it."""
    root = str(Path(row_op.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ready = [fresh / f"ready{i}" for i in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(fresh / "builds"), str(mine), str(fresh / "go")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for mine in ready
    ]
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in ready):
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        (fresh / "go").touch()
        said = {process.communicate(timeout=60)[0] for process in processes}
    assert len(said) == 1 and Path(said.pop().strip()).exists()
    assert (fresh / "builds").read_text() == "built "


# -- over ranks ----------------------------------------------------------------------------------------------------------


def agreed(who_has_it: tuple[bool, ...]) -> tuple[str, bool]:
    """On a rank: what is agreed where only some have the op."""
    from megastab.parallel import collectives

    rank, _ = collectives.world()
    held: Any = row_op.library()
    row_op.library = lambda: held if who_has_it[rank] else None
    return row_op.agree(), row_op.takes(rotation_of("hadamard", 0, "a", 20), torch.zeros(2, 20))


@pytest.mark.parametrize("who_has_it", [(True, True), (True, False), (False, False)])
def test_all_ranks_take_the_same_path(who_has_it: tuple[bool, bool], op: None) -> None:
    first, second = run_ranks(2, agreed, who_has_it)
    assert first == second and first[1] == all(who_has_it) and ("built C++ op" in first[0]) == all(who_has_it)


@pytest.mark.parametrize("name", ["zero1-dp3"])
def test_start_line_says_which_path_runs(name: str, op: None) -> None:
    """The jobs whose bits test_optim_ortho_layouts compares with one process's."""
    from tests.unit.optim.test_optim_ortho_layouts import ranks_of

    assert f", {row_op.describe()}; " in ranks_of(name)[0]["said"]
    assert ", in pure torch; " in ranks_of(name, "haar")[0]["said"]
