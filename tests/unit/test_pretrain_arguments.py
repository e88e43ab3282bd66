"""The launcher's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastab.pretrain import arguments, main

BASE = ("--deepspeed_config", "c.json")


def test_resume_is_short_for_its_key() -> None:
    assert arguments([*BASE, "a.b=1", "--resume", "none"]).overrides == ["a.b=1", "megastab.run.resume=none"]
    assert arguments([*BASE, "a.b=1"]).overrides == ["a.b=1"]


def test_what_launchers_add_is_taken() -> None:
    assert arguments(["--local_rank=1", *BASE, "--deepspeed"]).local_rank == 1


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_one_rank_speaks(
    rank: str, times: int, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        arguments([*BASE, "--bogus"])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("unrecognized arguments: --bogus") == times

    assert main(["--deepspeed_config", str(config_file), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("Memory of one rank") == times
