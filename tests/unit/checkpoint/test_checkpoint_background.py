"""Saving in the background: the same checkpoint as saving at once, while training goes on; what fails is told and leaves no trace.

The thread is held up on purpose, so that steps are taken while it writes. A rank's disk is full where the kernel lets its files grow no
further (RLIMIT_FSIZE): the write fails in the middle of a file, as it does for want of space.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastab.checkpoint import store, verify
from tests import jobs
from tests.layouts import SINGLE, config_of
from tests.ranks import RankFailed, run_ranks
from tests.unit.checkpoint.test_checkpoint_resume import CASES, HALF, WHOLE, config_for, curve, runs, train

LIMIT = 40_000  # bytes; the states of one rank take about 200 KB


def slow_writes(seconds: float) -> None:
    from megastab.checkpoint import writing

    write = writing.write_tensors

    def slowly(*args: Any) -> Any:
        time.sleep(seconds)
        return write(*args)

    writing.write_tensors = slowly  # type: ignore[assignment]


def slow_train(config: dict[str, Any]) -> Any:
    slow_writes(0.5)
    return train(config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if line["kind"] in kinds]


@pytest.mark.parametrize("name", ["zero3", "zero3-bf16-tp2", "bf16"])
def test_checkpoint_written_in_the_background_is_that_written_at_once(name: str, tmp_path: Path) -> None:
    world = CASES[name][0].world
    run_ranks(world, slow_train, config_for(name, tmp_path / "run", run__async_save=True))
    at_once = runs(name)[0] / "straight" / "checkpoints"
    for step in (HALF, WHOLE):
        here, there = (files_of(folder / store.tag_of(step)) for folder in (tmp_path / "run" / "checkpoints", at_once))
        assert here == there
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [HALF, WHOLE]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


def overtaken(folder: str) -> list[Any]:
    """On a rank: what is training's own goes on changing while the thread has not begun to write."""
    from megastab.checkpoint.manifest import Manifest
    from megastab.checkpoint.saver import Saver

    slow_writes(0.5)
    job, history = jobs.start(config_of(SINGLE)), [1.0]
    saver = Saver(job.built.adapter, job.grid, Path(folder), in_background=True)
    assert saver.save(Manifest.of(job.config, 1, 0, stability={"history": history})) == []
    history.append(2.0)
    (ended,) = saver.finish()
    return [ended.failure, Manifest.read(ended.where).stability["history"], saver.poll(), saver.finish()]


def test_statistics_that_go_on_changing_are_kept_as_they_were(tmp_path: Path) -> None:
    assert run_ranks(1, overtaken, str(tmp_path)) == [["", [1.0], [], []]]


def cramped(config: dict[str, Any], bad_step: int, place: tuple[int, str]) -> Any:
    """On a rank: files in a folder of one rank may not grow beyond LIMIT while ``bad_step`` is saved."""
    from megastab.checkpoint import writing
    from megastab.parallel import collectives

    write, (soft, hard) = writing.write_tensors, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path: Path, *args: Any) -> Any:
        if (collectives.world()[0], path.parent.name) == place and store.tag_of(bad_step) in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
        try:
            return write(path, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    writing.write_tensors = limited  # type: ignore[assignment]
    return train(config)


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize(("name", "place"), [("zero3", (1, "states")), ("zero3", (0, "weights")), ("bf16", (1, "states"))])
def test_rank_that_cannot_write_costs_one_checkpoint_and_not_the_run(
    name: str, place: tuple[int, str], in_background: bool, tmp_path: Path
) -> None:
    """ZeRO-3 gathers while it saves at once: a rank that fails must still take part. In the background its weights are written last."""
    config = config_for(name, tmp_path / "run", run__async_save=in_background, run__total_steps=WHOLE + 1)
    run_ranks(2, cramped, config, WHOLE, place)
    checkpoints = tmp_path / "run" / "checkpoints"
    (told,) = events(tmp_path / "run", "warning")
    assert (
        f"the checkpoint {checkpoints / store.tag_of(WHOLE)} could not be written (rank {place[0]}: [Errno 27] File too large"
        in told["reason"]
    )
    assert told["reason"].endswith("older ones stand") and told["step"] == WHOLE
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [HALF, WHOLE + 1]
    assert sorted(path.name for path in checkpoints.iterdir()) == [store.LATEST, store.tag_of(HALF), store.tag_of(WHOLE + 1)]
    assert all(verify.damage(checkpoints / store.tag_of(step)) == [] for step in (HALF, WHOLE + 1))


def mute(config: dict[str, Any], bad_step: int) -> Any:
    """On a rank: rank 1 cannot write a byte while ``bad_step`` is saved, not even a note that it cannot."""
    from megastab.checkpoint import writing
    from megastab.parallel import collectives

    write, (soft, hard) = writing.write_tensors, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path: Path, *args: Any) -> Any:
        is_bad = collectives.world()[0] == 1 and store.tag_of(bad_step) in str(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if is_bad else soft, hard))
        return write(path, *args)

    writing.write_tensors = limited  # type: ignore[assignment]
    return train(config)


@pytest.mark.parametrize("name", ["zero3", "bf16"])
def test_rank_that_cannot_even_leave_a_note_is_not_waited_for(name: str, tmp_path: Path) -> None:
    config = config_for(name, tmp_path / "run", run__async_save=True, run__total_steps=WHOLE + 1)
    run_ranks(2, mute, config, WHOLE)
    (told,) = events(tmp_path / "run", "warning")
    assert "could not be written (rank 1 left no note" in told["reason"]
    assert [event["step"] for event in events(tmp_path / "run", "save")] == [HALF, WHOLE + 1]


def killed(config: dict[str, Any], moment: str) -> Any:
    """On a rank: the process is gone in the middle of its second checkpoint."""
    import os
    import signal

    from megastab.checkpoint import writing
    from megastab.parallel import collectives

    rank, _ = collectives.world()
    write, rename = writing.write_tensors, os.rename

    def write_or_die(path: Path, *args: Any) -> Any:
        sealed = write(path, *args)
        if store.tag_of(WHOLE) in str(path) and (moment, rank) == ("writing", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return sealed

    def rename_or_die(source: Any, target: Any) -> None:
        if store.tag_of(WHOLE) in str(target) and moment == "before the name":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if store.tag_of(WHOLE) in str(target) and moment == "before latest":
            os.kill(os.getpid(), signal.SIGKILL)

    writing.write_tensors, os.rename = write_or_die, rename_or_die  # type: ignore[assignment]
    return train(config)


@pytest.mark.parametrize("moment", ["writing", "before the name", "before latest"])
def test_rank_killed_inside_a_save_leaves_a_run_that_goes_on_exactly(moment: str, tmp_path: Path) -> None:
    config = config_for("bf16", tmp_path / "run", run__resume="auto")
    with pytest.raises(RankFailed, match="died|rank"):
        run_ranks(2, killed, config, moment)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / store.LATEST).read_text() == store.tag_of(HALF)
    after = run_ranks(2, train, config)
    _, straight, _ = runs("bf16")
    assert curve(tmp_path / "run") == curve(runs("bf16")[0] / "straight")
    assert events(tmp_path / "run", "resume")[-1]["reason"].endswith(store.tag_of(WHOLE if moment == "before latest" else HALF))
    for mine, theirs in zip(after, straight, strict=True):
        assert all(np.array_equal(a[3], b[3]) for a, b in zip(mine["masters"], theirs["masters"], strict=True))
    assert sorted(path.name for path in checkpoints.iterdir()) == [store.LATEST, store.tag_of(HALF), store.tag_of(WHOLE)]
    assert (checkpoints / store.LATEST).read_text() == store.tag_of(WHOLE)
