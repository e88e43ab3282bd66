"""The launcher's command line."""

from __future__ import annotations

from megastab.pretrain import arguments

BASE = ("--deepspeed_config", "c.json")


def test_resume_is_short_for_its_key() -> None:
    assert arguments([*BASE, "a.b=1", "--resume", "none"]).overrides == ["a.b=1", "megastab.run.resume=none"]
    assert arguments([*BASE, "a.b=1"]).overrides == ["a.b=1"]


def test_what_launchers_add_is_taken() -> None:
    assert arguments(["--local_rank=1", *BASE, "--deepspeed"]).local_rank == 1
