"""The bench's arithmetic, its processes, and its command line. No test asserts a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megastab.config.load import load_config
from megastab.data.indexed import open_indexed
from megastab.report.bench import run
from megastab.report.bench.cases import Options, Spec
from megastab.report.bench.jobs import ROOT, Failed, Job, Reply, last_words
from megastab.report.bench.rows import Row, table
from megastab.report.bench.series import Times, compared, paired_ratio, speed_ratio, take_turns, times
from megastab.report.bench.start import write_tokens


@pytest.mark.parametrize(
    ("value", "bound", "is_floor", "verdict"),
    [(0.95, 0.9, True, "ok"), (0.9, 0.9, True, "ok"), (0.8, 0.9, True, "MISSED"), (0.2, 0.3, False, "ok"), (0.4, 0.3, False, "MISSED")]
    + [(1.0, None, True, ""), (None, 0.9, True, "failed")],
)
def test_verdict(value: float | None, bound: float | None, is_floor: bool, verdict: str) -> None:
    assert Row("f", "c", value, bound=bound, is_floor=is_floor).verdict == verdict


def test_table_is_aligned() -> None:
    first, *lines = table(
        [Row("single", "A", 0.5, bound=0.95, detail="slow"), Row("start", "help", 12.25, "s", 1.0, False, "late")]
    ).splitlines()
    assert all(line.index(word) == first.index("detail") for line, word in zip(lines, ("slow", "late"), strict=True))
    assert "0.500 x  >= 0.95   MISSED" in lines[0] and "12.250 s  <= 1" in lines[1]


def test_ratios_are_speeds_over_speeds() -> None:
    ours, theirs = [1.0, 2.0, 4.0], [1.0, 1.0, 8.0]
    assert speed_ratio(ours, theirs) == 0.5
    assert paired_ratio(ours, theirs) == 1.0
    said = compared(Times(ours, [1.0]), Times(theirs, [3.0]), "other")
    assert said == "1,024 tokens/s, other 2,048; median of pairwise ratios 1.000, by CPU time 3.000"


def test_times_are_those_of_one_contestant() -> None:
    replies = [Reply([1.0, 2.0], cpu_seconds=[3.0, 4.0]), Reply([5.0, 6.0], cpu_seconds=[7.0, 8.0])]
    assert times(replies, 1) == Times([2.0, 6.0], [4.0, 8.0])


@pytest.mark.parametrize(
    "spec", [Spec("ours"), Spec("both", "B", "fp32", True), Spec("ours", zero_stage=3), Spec("ours", tensor=2, data="x")]
)
def test_spec_survives_the_command_line_and_is_a_config(spec: Spec) -> None:
    assert Spec.parse(spec.dump()) == spec
    config = load_config(spec.source(), world_size=spec.tensor)
    assert config.precision == spec.precision
    assert config.zero_stage == (0 if spec.precision == "fp32" else spec.zero_stage)
    assert config.megastab.run.compile == spec.is_compiled


CHILD = """#!{python}
import os, sys
from megastab.report.bench.child import Turns
turns = Turns()
print("noise that is no reply", flush=True)
me = float(os.environ["RANK"])
steps = iter(range(100))
turns.serve(lambda: dict(seconds=[me + next(steps)]), lambda: 7.0)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Takes the place of the interpreter that runs children: it imports nothing and steps at once."""
    path = tmp_path / "child"
    path.write_text(CHILD.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    yield path


def test_jobs_step_in_turn_and_rank_0_answers(child: Path) -> None:
    with Job(Spec("ours"), 1, ranks=2) as two, Job(Spec("bare"), 1) as one:
        replies = take_turns([two, one], warmup=2, rounds=3)
        assert two.grown_bytes() == 7.0
    assert replies == [[Reply([2.0]), Reply([3.0]), Reply([4.0])]] * 2
    assert all(process.returncode == 0 for job in (two, one) for process in job.processes)


@pytest.mark.parametrize("place", ["before", "in a step"])
def test_a_failing_child_is_quoted(child: Path, place: str) -> None:
    fail = "raise SystemExit('out of luck')"
    child.write_text(child.read_text().replace("steps = ", f"{fail}\nsteps = ") if place == "before" else f"{CHILD_FAILS}")
    with pytest.raises(Failed, match="out of luck"), Job(Spec("ours"), 1) as job:
        job.step()


CHILD_FAILS = CHILD.format(python=sys.executable).replace("dict(seconds=[me + next(steps)])", "sys.exit('out of luck')")


def test_last_words() -> None:
    assert last_words("a\nb\n\nc\nd\n") == "b | c | d"
    assert last_words("\n") == "it printed nothing"


def test_written_tokens_are_a_dataset(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", vocab_size=50, num_documents=3, length=20)
    opened = open_indexed(tmp_path / "tokens", vocab_size=50)
    assert opened.lengths.tolist() == [20] * 3 and opened.tokens.max() < 50


def test_a_failed_figure_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fails(options: Options) -> Iterator[Row]:
        yield Row("single", "first", 1.0, bound=0.9, raw={"seconds": [1.0]})
        raise Failed("no luck")

    monkeypatch.setitem(run.FIGURES, "single", fails)
    rows = run.run(["single"], Options(is_quick=True), tmp_path / "out.json")
    assert [row.verdict for row in rows] == ["ok", "failed"]
    assert "no luck" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"][0]["raw"] == {"seconds": [1.0]} and written["machine"]["torch"]


def test_command_line_names_every_figure() -> None:
    spec = importlib.util.spec_from_file_location("bench_tool", ROOT / "tools" / "bench.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert list(tool.NAMES) == list(run.FIGURES)


def test_collectives_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megastab.parallel import collectives
    from megastab.report.bench import contestants

    for name in contestants._TIMED:
        monkeypatch.setattr(collectives, name, getattr(collectives, name))  # put back afterwards
    clock = contestants.time_collectives()
    assert clock["seconds"] == 0.0
    assert collectives.sum_scalars([2.0], None) == [2.0]
    assert clock["seconds"] > 0.0
