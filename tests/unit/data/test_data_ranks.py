"""One output for any number of ranks, of every format; and what a run that died had finished is used by the next."""

from __future__ import annotations

import gzip
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from corpora import write_jsonl
from pyarrow import parquet
from threads import ThreadRank, on_ranks

from megastab.config.errors import UserError
from megastab.data import prepare as prepare_module
from megastab.data.documents import plan_units
from megastab.data.finished import part_names
from megastab.data.merging import publish
from megastab.data.prepare import prepare
from megastab.data.sampling import sample, shares
from megastab.data.shards import Job, tokenize_unit
from megastab.data.tokenizer import Tokenizer
from megastab.data.tokenizer_training import _documents, train_tokenizer
from megastab.data.world import share_out

MAKERS: dict[str, Callable[[Path, list[str]], Path]] = {}


def maker(function: Callable[[Path, list[str]], Path]) -> Callable[[Path, list[str]], Path]:
    MAKERS[function.__name__] = function
    return function


@maker
def jsonl(folder: Path, texts: list[str]) -> Path:
    return write_jsonl(folder / "d.jsonl", texts)


@maker
def jsonl_gz(folder: Path, texts: list[str]) -> Path:
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(folder, texts).read_bytes()))
    return folder / "d.jsonl.gz"


@maker
def jsonl_zst(folder: Path, texts: list[str]) -> Path:
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(jsonl(folder, texts).read_bytes()))
    return folder / "d.jsonl.zst"


@maker
def rows(folder: Path, texts: list[str]) -> Path:
    parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet", row_group_size=20)
    return folder / "d.parquet"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def expected(tokenizer: Tokenizer, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the texts three times over, from plain lines."""
    folder = tmp_path_factory.mktemp("expected")
    prepare([write_jsonl(folder / "c.jsonl", texts)] * 3, folder / "out" / "d", tokenizer.path, valid_fraction=0.2)
    return contents(folder / "out")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_output_does_not_depend_on_ranks_or_format(
    tokenizer: Tokenizer, texts: list[str], expected: dict[str, bytes], tmp_path: Path, make: Callable[[Path, list[str]], Path], ranks: int
) -> None:
    inputs = [make(tmp_path, texts)] * 3
    at_work = set()

    def work(world: ThreadRank) -> Any:
        return prepare(inputs, tmp_path / "out" / "d", tokenizer.path, 1, 0.2, unit_bytes=4000, world=watched(world, at_work))

    written = on_ranks(ranks, work)
    assert contents(tmp_path / "out") == expected
    assert list(map(bool, written)) == [True] + [False] * (ranks - 1)
    assert at_work == set(range(1, ranks))  # rank 0 tells nobody


def watched(world: ThreadRank, at_work: set[int]) -> ThreadRank:
    """Notes which ranks other than 0 told of bytes they did."""
    tell = world.tell

    def noted(amount: int | None) -> None:
        if amount and world.rank:
            at_work.add(world.rank)
        tell(amount)

    world.tell = noted  # type: ignore[method-assign]
    return world


def test_shares_hold_everything_once_and_differ_by_no_more_than_the_largest() -> None:
    draw = random.Random(1)
    for ranks in (1, 2, 3, 7):
        sizes = [draw.choice((0, 1, 50, 5000)) for _ in range(40)]
        shared = share_out(sizes, ranks)
        assert sorted(position for share in shared for position in share) == list(range(40))
        assert all(share == sorted(share) for share in shared)
        loads = [sum(max(sizes[position], 1) for position in share) for share in shared]
        assert max(loads) - min(loads) <= max(sizes)
    assert share_out([4, 3, 3, 2], 2) == [[0, 3], [1, 2]]  # by size, not by turns
    assert share_out([], 2) == [[], []]


def test_input_given_twice_is_two_parts(corpus: Path) -> None:
    units = plan_units([corpus, corpus], 3000)
    names = part_names(units, [])
    assert len(set(names)) == len(units)
    assert names == part_names(units, []) and set(names).isdisjoint(part_names(units, ["another option"]))


class Died(Exception):
    """What a test raises where a process would be gone."""


def died_halfway(corpus: Path, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, key: str = "text") -> set[str]:
    """Run until some parts are finished; their names."""
    with monkeypatch.context() as patch:
        count = iter(range(100))

        def dying(*arguments: Any) -> None:
            if next(count) == 5:
                raise Died
            tokenize_unit(*arguments)

        patch.setattr(prepare_module, "tokenize_unit", dying)
        with pytest.raises(Died):
            prepare([corpus], out / "d", tokenizer.path, key=key, unit_bytes=3000)
    return {path.stem for path in (out / "d.partial").glob("*.npz")}


def made_again(corpus: Path, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ranks: int = 1, **options: Any) -> set[str]:
    """Run to the end; names of the parts that were made, not taken over."""
    made = set()

    def noting(job: Any, name: str, unit: Any) -> None:
        made.add(name)
        tokenize_unit(job, name, unit)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize_unit", noting)
        on_ranks(ranks, lambda world: prepare([corpus], out / "d", tokenizer.path, unit_bytes=3000, world=world, **options))
    return made


@pytest.mark.parametrize("ranks", [1, 3])
def test_restart_makes_only_what_is_missing(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    prepare([corpus], tmp_path / "whole" / "d", tokenizer.path)
    finished = died_halfway(corpus, tmp_path / "out", tokenizer, monkeypatch)
    assert len(finished) == 5
    damaged, cut_off, *_ = sorted(finished)
    shard = tmp_path / "out" / "d.partial" / f"{damaged}.all"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))  # the same size
    marker = tmp_path / "out" / "d.partial" / f"{cut_off}.npz"
    marker.write_bytes(marker.read_bytes()[:-40])
    made = made_again(corpus, tmp_path / "out", tokenizer, monkeypatch, ranks)
    assert made & finished == {damaged, cut_off}
    assert len(made) == len(plan_units([corpus], 3000)) - 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_changed_input_tokenizer_or_option_makes_everything_again(
    tokenizer: Tokenizer, corpus: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = train_tokenizer([write_jsonl(tmp_path / "o.jsonl", texts[:250])], tmp_path / "other", tokenizer.vocab_size)
    mine = write_jsonl(tmp_path / "c.jsonl", texts)
    for change in ("input", "tokenizer", "eod", "split", "nothing"):
        out = tmp_path / change
        finished = died_halfway(mine, out, tokenizer, monkeypatch)
        caplog.clear()
        if change == "input":  # same path, same size, another text
            before = mine.stat()
            mine.write_bytes(mine.read_bytes().replace(b"alpha", b"gamma"))
            os.utime(mine, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        options: dict[str, Any] = {"eod": {"append_eod": False}, "split": {"valid_fraction": 0.3}}.get(change, {})
        with caplog.at_level(logging.WARNING):
            made = made_again(mine, out, other if change == "tokenizer" else tokenizer, monkeypatch, **options)
        assert bool(made & finished) is False
        assert len(made) == len(plan_units([mine], 3000)) - (5 if change == "nothing" else 0), change
        assert ("5 more there are damaged, or of other input" in caplog.text) is (change != "nothing")
        if change == "input":
            prepare([mine], tmp_path / "fresh" / "d", tokenizer.path)
            assert contents(out) == contents(tmp_path / "fresh")


def test_file_that_changes_under_the_reader_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", texts)
    planned = plan_units([path])
    write_jsonl(path, [*texts, "one more"])
    monkeypatch.setattr(prepare_module, "plan_units", lambda *_: planned)
    with pytest.raises(UserError, match=r"c\.jsonl: changed while it was read"):
        prepare([path], tmp_path / "d", tokenizer.path)
    assert not (tmp_path / "d.partial").exists()  # nothing was finished


def test_two_runs_on_one_output_are_refused(tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: Any) -> None:
        prepare([corpus], tmp_path / "d", tokenizer.path)

    monkeypatch.setattr(prepare_module, "tokenize_unit", second)
    with pytest.raises(UserError, match=r"d\.partial: another run is at work"):
        prepare([corpus], tmp_path / "d", tokenizer.path)


def test_rank_with_another_tokenizer_or_without_the_folder_is_named(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    other = train_tokenizer([corpus], tmp_path / "other", 380)
    paths = [tokenizer.path, other.path]
    with pytest.raises(UserError, match="rank 1 finds another file"):
        on_ranks(2, lambda world: prepare([corpus], tmp_path / "d", paths[world.rank], world=world))
    with pytest.raises(UserError, match="rank 1 does not see this folder"):
        on_ranks(2, lambda world: prepare([corpus], tmp_path / f"e{world.rank}", tokenizer.path, world=world))


def test_shard_that_vanished_is_not_merged(tokenizer: Tokenizer, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(job: Job, names: list[str], prefix: Path) -> Any:
        shard = job.folder / f"{names[1]}.all"
        shard.write_bytes(shard.read_bytes()[:-2])
        return publish(job, names, prefix)

    monkeypatch.setattr(prepare_module, "publish", losing)
    with pytest.raises(UserError, match=r"\.all: is \d+ bytes and not \d+; start the same command again"):
        prepare([corpus], tmp_path / "d", tokenizer.path, unit_bytes=3000)
    assert not list(tmp_path.glob("d.*x"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_bytes", [3, 1000, 9_001, 40_000, 10**9])
def test_sample_does_not_depend_on_ranks(tmp_path: Path, texts: list[str], ranks: int, max_bytes: int) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n * n : n * n + 9 * n % 31 + 1]) for n in range(12)]
    (tmp_path / "e.txt").write_text("\u6f22" * 2000)
    units = plan_units([*paths, tmp_path / "e.txt"])
    alone = [document for document in _documents(units, "text", max_bytes) if document]
    first, *others = on_ranks(ranks, lambda world: list(sample(units, "text", max_bytes, world)))
    assert [document for document in first if document] == alone
    assert not any(others)
    assert sum(map(len, alone)) <= max_bytes


def test_tokenizer_does_not_depend_on_ranks(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    made = on_ranks(3, lambda world: train_tokenizer([corpus], tmp_path / "t", 400, world=world))
    assert {one.fingerprint for one in made} == {tokenizer.fingerprint}


def test_shares_grow_by_what_short_units_leave() -> None:
    assert shares([(333, False)] * 3, 1000) == [333, 333, 334]
    assert shares([(10, True), (500, False), (500, False)], 1000) == [333, 495, 495]
    assert shares([(10, True), (20, True), (500, True)], 1000) == [333, 495, 970]
