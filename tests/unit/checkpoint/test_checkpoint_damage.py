"""Damaged checkpoints: found before anything is loaded, named with file and reason, passed over for the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megastab.checkpoint import manifest, store
from megastab.checkpoint.index import Index
from megastab.checkpoint.manifest import Manifest
from megastab.checkpoint.pieces import Piece
from megastab.config.errors import UserError
from tests.unit.checkpoint.test_checkpoint_resume import HALF, WHOLE, runs

OLDER, NEWEST = store.tag_of(HALF), store.tag_of(WHOLE)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A checkpoints folder with two checkpoints of two ZeRO-1 ranks."""
    return Path(shutil.copytree(runs("bf16")[0] / "straight" / "checkpoints", tmp_path / "checkpoints"))


def wanted(kept: Path) -> Manifest:
    return Manifest.read(kept / OLDER)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace_by_older(path: Path) -> None:
    shutil.copy(path.parents[2] / OLDER / path.relative_to(path.parents[1]), path)


def add_foreign(path: Path) -> None:
    shutil.copy(path, path.with_name("rank0007.safetensors"))


RANK1, WEIGHTS = "states/rank0001.safetensors", "weights/pp00-tp00.safetensors"
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    (RANK1, truncate, r"states/rank0001.safetensors is truncated: \d+ of \d+ bytes"),
    (RANK1, flip, r"states/rank0001.safetensors is not what was written \(\d+ bytes of \d+, another checksum\)"),
    (RANK1, lambda path: flip(path, 0.0), "states/rank0001.safetensors is not what was written"),
    (RANK1, Path.unlink, "states/rank0001.safetensors is missing"),
    (RANK1, replace_by_older, rf"states/rank0001.safetensors is a file of another checkpoint \({OLDER}\)"),
    (RANK1, add_foreign, "states/rank0007.safetensors does not belong to this checkpoint"),
    (WEIGHTS, flip, "weights/pp00-tp00.safetensors is not what was written"),
    (WEIGHTS, Path.unlink, "weights/pp00-tp00.safetensors is missing"),
    ("index.json", flip, "index.json is not what was written"),
    ("index.json", truncate, "index.json is truncated"),
    (manifest.FILE, flip, "megastab.json is damaged"),
    (manifest.FILE, truncate, "megastab.json is damaged"),
    (manifest.FILE, Path.unlink, "megastab.json is missing"),
]


@pytest.mark.parametrize(("name", "break_", "said"), FAULTS)
def test_damage_is_named_and_the_one_before_is_taken(kept: Path, name: str, break_: Callable[[Path], None], said: str) -> None:
    break_(kept / NEWEST / name)
    told: list[str] = []
    assert store.find("auto", kept, wanted(kept), told.append) == kept / OLDER
    with pytest.raises(UserError, match=said) as asked:
        store.find(str(kept / NEWEST), kept, wanted(kept))
    assert len(told) == 1 and told[0] in str(asked.value) and "Set megastab.run.resume to an older one" in str(asked.value)
    with pytest.raises(UserError, match=said):
        store.find(str(kept), kept, wanted(kept))


def test_whole_ones_are_taken_and_nothing_is_said(kept: Path) -> None:
    told: list[str] = []
    assert store.find("auto", kept, wanted(kept), told.append) == kept / NEWEST
    assert store.find(str(kept / OLDER), kept, wanted(kept), told.append) == kept / OLDER and told == []


def test_lost_latest_and_none_whole(kept: Path) -> None:
    (kept / store.LATEST).unlink()
    assert store.find("auto", kept, wanted(kept)) == kept / NEWEST
    asked = wanted(kept)
    for tag in (OLDER, NEWEST):
        truncate(kept / tag / RANK1)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged: set megastab.run.resume"):
        store.find("auto", kept, asked)
    shutil.rmtree(kept)
    assert store.find("auto", kept, asked) is None


def test_latest_rules_over_later_steps_of_a_run_that_went_back(kept: Path) -> None:
    (kept / store.LATEST).write_text(OLDER)
    assert store.find("auto", kept, wanted(kept)) == kept / OLDER


class Crash(BaseException):
    """The process is gone."""


def publish_until(kept: Path, monkeypatch: pytest.MonkeyPatch, crash: str) -> None:
    """Publish the newest checkpoint once more, until the process dies as ``crash`` is about to be written or the folder renamed."""
    written, aside = Manifest.read(kept / NEWEST), kept / f"{NEWEST}.partial"
    (kept / NEWEST).rename(aside)
    (kept / store.LATEST).write_text(OLDER)
    own = {name: values for name, values in written.files.items() if name != "index.json"}
    pieces = json.loads((aside / "index.json").read_text())
    (aside / "rank0000.json").write_text(json.dumps({"files": own, "pieces": pieces}))
    write_text = store.write_text

    def write(path: Path, text: str) -> Any:
        if path.name == crash:
            raise Crash
        return write_text(path, text)

    def die(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(store, "write_text", write)
        if crash == "rename":
            patch.setattr("os.rename", die)
        store.publish(kept, NEWEST, written, None, None)


def test_a_checkpoint_is_found_though_the_crash_came_before_latest(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = wanted(kept), list[str]()
    publish_until(kept, monkeypatch, store.LATEST)
    assert (kept / store.LATEST).read_text() == OLDER and store.find("auto", kept, asked, told.append) == kept / NEWEST and told == []
    flip(kept / NEWEST / RANK1)
    assert store.find("auto", kept, asked, told.append) == kept / OLDER and "rank0001.safetensors is not what was written" in told[0]


def test_a_crash_before_the_rename_leaves_the_one_before(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = wanted(kept), list[str]()
    publish_until(kept, monkeypatch, "rename")
    assert store.find("auto", kept, asked, told.append) == kept / OLDER and told == []
    shutil.copytree(kept / f"{NEWEST}.partial", kept / store.tag_of(WHOLE + 1))  # of steps that were taken back
    assert store.find("auto", kept, asked, told.append) == kept / OLDER and told == []


def test_what_was_taken_back_is_not_found_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = wanted(kept)
    publish_until(kept, monkeypatch, store.LATEST)

    def crash(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(store, "settle", crash)  # after ``latest``, before the later ones are deleted
        store.go_back(kept / OLDER)
    assert (kept / NEWEST / manifest.FILE).exists() and store.find("auto", kept, asked) == kept / OLDER


def test_unfinished_folder_is_none(kept: Path) -> None:
    shutil.copytree(kept / NEWEST, kept / f"{store.tag_of(9)}.partial")
    (kept / store.LATEST).unlink()
    assert store.find("auto", kept, wanted(kept)) == kept / NEWEST


def test_index_covers_every_element_once_and_says_where_it_does_not(kept: Path) -> None:
    table = json.loads((kept / NEWEST / "index.json").read_text())
    whole = {file: [Piece(*values) for values in held] for file, held in table.items()}
    assert Index(whole).faults() == []
    assert len(Index(whole).sizes) == 2 * 16 + 4, "matrices and biases of two blocks; embedding, positions, final norm and its bias"
    for file in whole:
        for left_out, piece in enumerate(whole[file]):
            less = {**whole, file: [other for place, other in enumerate(whole[file]) if place != left_out]}
            assert any(piece.name in fault for fault in Index(less).faults()), piece
        first = whole[file][0]
        twice = {**whole, file: [*whole[file], first]}
        assert any(f"of {first.name}: element {first.first} is there twice" in fault for fault in Index(twice).faults())


def test_old_ones_go_and_multiples_stay(tmp_path: Path, kept: Path) -> None:
    for step in (1, 2, 4, 6, 8, 9):
        shutil.copytree(kept / NEWEST, tmp_path / "run" / store.tag_of(step))
    store._prune(tmp_path / "run", store.tag_of(8), keep_last=2, keep_every=4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [store.tag_of(step) for step in (4, 6, 8, 9)]


def test_checkpoint_of_an_older_format_is_refused_and_not_called_damaged(kept: Path) -> None:
    path = kept / NEWEST / manifest.FILE
    asked, older = wanted(kept), json.loads(path.read_text())
    path.write_text(
        json.dumps({key: older[key] for key in ("step", "consumed", "model", "layout", "tokenizer", "stability")} | {"format": 1})
    )
    with pytest.raises(UserError, match="is of format 1 "):
        store.find("auto", kept, asked)
