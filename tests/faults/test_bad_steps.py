"""NaN in one rank's activations: the step is skipped, replayed once and explained; too many of them end the run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bad_steps import plant
from tests.launching import Finished, pretrain, records


def run(config_file: Path, bad: set[int], *overrides: str) -> Finished:
    return pretrain("--deepspeed_config", str(config_file), *overrides, plant=partial(plant, bad))


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", [0, 2])
def test_a_bad_step_is_skipped_replayed_and_explained(zero: int, config_file: Path, tmp_path: Path) -> None:
    done = run(config_file, {3, 5}, f"zero_optimization.stage={zero}", "megastab.stability.zclip.warmup_steps=2")
    assert done.code == 0, done.text
    found = events(tmp_path)
    skips = [event for event in found if event["kind"] == "skip"]
    assert [event["step"] for event in skips] == [3, 5] and all("not finite" in event["reason"] for event in skips)
    assert skips[0]["norm"] is None and skips[0]["samples"] == [8, 11]
    assert skips[0]["top"][0]["share"] is None and all(share["name"] for share in skips[0]["top"])
    (replay,) = (event for event in found if event["kind"] == "replay")  # the first one only
    assert (replay["step"], replay["rank"], replay["micro_batch"], replay["repeats"]) == (3, 1, 0, True)
    assert replay["what"] == "output" and "layers.1" in replay["name"] and "MLP" in replay["module"]
    taken = {record["step"]: record for record in records(tmp_path / "run")}
    assert taken[3]["action"] == "skip" and taken[3]["lr"] == taken[4]["lr"]  # the schedule has not moved
    assert taken[4]["action"] != "skip" and taken[6]["loss"] < taken[1]["loss"]


@pytest.mark.parametrize(
    ("rewind_after", "said", "rewinds"),
    [("2", "after 2 rewinds without a step beyond the furthest", [4, 4]), ("null", "3 steps in a row could not be used", [])],
    ids=["rewinding", "only counting"],
)
def test_steps_that_stay_bad_end_the_run(rewind_after: str, said: str, rewinds: list[int], config_file: Path, tmp_path: Path) -> None:
    settings = {"rewind_after": rewind_after, "max_nonfinite_in_a_row": 2, "max_rewinds": 2}
    policy = [f"megastab.stability.policy.{key}={value}" for key, value in settings.items()]
    done = run(config_file, {3, 4, 5, 6}, "megastab.run.save_interval=1", *policy)
    assert done.code == 86 and "error: training stopped: " in done.text and said in done.text, done.text
    assert done.text.count("error: ") == 1 and "Traceback" not in done.text
    found = [event for event in events(tmp_path) if event["kind"] == "rewind"]
    assert [event["step"] for event in found] == rewinds and [event["samples"] for event in found] == [[8, 15], [16, 23]][: len(found)]
    assert all("2 bad steps in a row, from step 3: went back to step00000002" in event["reason"] for event in found)
