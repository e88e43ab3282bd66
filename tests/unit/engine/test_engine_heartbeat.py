"""Who the others wait for, from what every rank's heartbeat says."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megastab.engine.heartbeat import Beat, Heart, describe_hang, read_beats, who_lags
from megastab.engine.watch import place_of

ASKED = 5.0
ALIKE = {rank: Beat(rank, f"node{rank // 2}", 100 + rank, "", 7, "training", 9, 1.0, ASKED, "all_reduce", True) for rank in range(4)}


def test_a_rank_that_does_not_answer_comes_first() -> None:
    beats = {**ALIKE, 2: replace(ALIKE[2], answers=0.0), 1: replace(ALIKE[1], count=3)}
    lagging, why = who_lags(beats, 4, {ASKED, 6.0})
    assert lagging == [2] and "does not answer" in why
    said = describe_hang(beats, lagging, why, 30)
    assert "no progress for 30 seconds: rank 2 on node1 (process 102), training after step 7" in said
    del beats[2]
    lagging, why = who_lags(beats, 4, {ASKED})
    assert lagging == [2] and "rank 2, which never wrote a heartbeat" in describe_hang(beats, lagging, why, 30)


def test_then_one_that_has_come_less_far_then_one_that_does_not_wait() -> None:
    busy = replace(ALIKE[3], is_waiting=False, where="disk.py:3 read")
    assert who_lags({**ALIKE, 3: busy, 1: replace(ALIKE[1], count=8)}, 4, {ASKED})[0] == [1]
    lagging, why = who_lags({**ALIKE, 3: busy}, 4, {ASKED})
    assert lagging == [3] and "rank 3 stands in disk.py:3 read" in describe_hang({**ALIKE, 3: busy}, lagging, why, 30)


def test_where_all_look_alike_nobody_is_blamed() -> None:
    lagging, why = who_lags(ALIKE, 4, {ASKED})
    assert lagging == [] and "no rank lags (all ranks answer" in describe_hang(ALIKE, lagging, why, 30)


def test_heartbeats_are_files_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = [Heart(tmp_path, rank) for rank in range(2)]
    for heart in hearts:
        heart.begin()
        heart.beat(1, "training")
    beats = read_beats(tmp_path)
    assert [(beat.step, beat.phase) for beat in beats.values()] == [(0, "starting")] * 2  # written a moment ago
    monkeypatch.setattr("megastab.engine.heartbeat.WRITE_SECONDS", 0.0)
    hearts[1].beat(2, "saving")
    assert (read_beats(tmp_path)[1].step, read_beats(tmp_path)[1].phase, read_beats(tmp_path)[1].count) == (2, "saving", 2)
    (tmp_path / "heartbeats" / "rank0000").write_text('{"rank": 0, "ho')
    assert sorted(read_beats(tmp_path)) == [1]
    json.loads((tmp_path / "heartbeats" / "rank0001").read_text())


def test_a_disk_that_is_away_ends_no_run(tmp_path: Path) -> None:
    Heart(tmp_path / "nowhere", 0).beat(1, "training")


def test_the_place_of_a_thread_is_its_innermost_frames() -> None:
    def wait_for_the_disk() -> None:
        time.sleep(5)

    thread = threading.Thread(target=wait_for_the_disk, daemon=True)
    thread.start()
    time.sleep(0.2)
    where, is_waiting = place_of(thread.ident)
    assert where.startswith("test_engine_heartbeat.py:") and "wait_for_the_disk" in where and not is_waiting
    assert place_of(None) == ("", False)
