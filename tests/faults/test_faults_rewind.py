"""Samples that spoil every step they are in: the run goes back, leaves them out, and is the run that never saw them, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.planted import BadSamples, train_synthetic
from tests.launching import curve
from tests.layouts import GPT, Layout, config_of
from tests.ranks import RankFailed, run_ranks

STEPS = 8
BAD = range(40, 50)  # in steps 4 and 5 of twelve samples each
LEFT_OUT = [36, 59]  # all samples of these two steps
NOTHING = range(0)


def config_for(folder: Path, layout: Layout, dtype: str = "fp32", optimizer: str = "AdamW", **changes: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "model": {**GPT, "dropout": 0.1, "num_kv_heads": 2},
        "stability": {
            "zclip": {"warmup_steps": 2, "z_thresh": 0.3},
            "tvr": {"target_std": 0.09, "interval_steps": 2},
            # Of the losses of two steps, between which 6 deviations are nothing, a loss a thousand times too large is 1e5 away.
            "policy": {"rewind_after": 2, "loss_spike": 1000.0},
        },
        "run": {"dir": str(folder), "total_steps": STEPS, "save_interval": 2, "resume": "auto"},
    }
    if dtype == "fp16":  # a scale so low that the huge loss does not overflow (which the scaler would answer), and grows on the way
        fixed["ds__fp16"] = {"enabled": True, "initial_scale_power": 1, "loss_scale_window": 3}
    return config_of(layout, optimizer, dtype, **{**fixed, **changes})


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    pairs = [pair for mine, theirs in zip(found, expected, strict=True) for pair in zip(mine["masters"], theirs["masters"], strict=True)]
    return all(np.array_equal(mine[3], theirs[3]) for mine, theirs in pairs) and found[0]["consumed"] == expected[0]["consumed"]


@pytest.mark.parametrize(
    ("layout", "optimizer", "dtype", "kind"),
    [
        (Layout(2, zero=1), "AdamW", "bf16", "nan"),
        (Layout(2, tp=2, sp=True), "AdamW", "fp32", "huge"),
        (Layout(2, pp=2, accumulation=2), "AdamW", "fp32", "huge"),
        (Layout(2, cp=2, zero=1), "AdamW", "bf16", "nan"),
        pytest.param(Layout(2, zero=3), "AdamW", "fp32", "nan", marks=pytest.mark.long),
        pytest.param(Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2), "AdamW", "bf16", "nan", marks=pytest.mark.long),
        pytest.param(Layout(2, zero=2), "OrthoAdam", "bf16", "nan", marks=pytest.mark.long),
        pytest.param(Layout(2, zero=1), "AdamW", "fp16", "huge", marks=pytest.mark.long),
        pytest.param(Layout(4, cp=2, pp=2, accumulation=2), "AdamW", "fp32", "huge", marks=pytest.mark.long),
    ],
    ids=[
        "dp2-zero1-bf16-nan",
        "tp2-huge",
        "pp2-huge",
        "cp2-nan",
        "zero3-nan",
        "tp2-pp2-bf16-nan",
        "ortho-zero2-nan",
        "fp16-huge",
        "cp2-pp2-huge",
    ],
)
def test_a_rewound_run_is_the_run_that_left_the_samples_out(layout: Layout, optimizer: str, dtype: str, kind: str, tmp_path: Path) -> None:
    rewound, clean = tmp_path / "rewound", tmp_path / "clean"
    found = run_ranks(layout.world, train_synthetic, config_for(rewound, layout, dtype, optimizer), BadSamples(BAD, kind))
    skipping = config_for(clean, layout, dtype, optimizer, data__skip=[LEFT_OUT])
    expected = run_ranks(layout.world, train_synthetic, skipping, BadSamples(NOTHING, kind))
    assert [step for step, *_ in curve(clean)] == list(range(1, STEPS + 1))
    assert curve(rewound) == curve(clean) and same(found, expected)
    (event,) = events(rewound, "rewind")
    assert (event["step"], event["to_step"], event["samples"]) == (5, 2, LEFT_OUT)
    assert "2 bad steps in a row, from step 4: went back to step00000002" in event["reason"]
    bad = events(rewound, "skip" if kind == "nan" else "loss_spike")
    assert [(each["step"], each["undone"]) for each in bad] == [(4, True), (5, True)]
    manifest = json.loads((rewound / "checkpoints" / f"step{STEPS:08d}" / "megastab.json").read_text())
    assert manifest["skips"] == [LEFT_OUT] and manifest["consumed"] == 12 * (STEPS + 2)


@pytest.mark.parametrize("save_interval", [2, None], ids=["checkpoint before", "no checkpoint"])
@pytest.mark.parametrize(
    ("layout", "dtype", "kind"),
    [(Layout(2, zero=2), "bf16", "nan"), pytest.param(Layout(2, pp=2, accumulation=2), "fp32", "huge", marks=pytest.mark.long)],
    ids=["zero2-bf16", "pp2"],
)
def test_a_copy_in_memory_is_as_good_as_a_checkpoint(
    layout: Layout, dtype: str, kind: str, save_interval: int | None, tmp_path: Path
) -> None:
    rewound, clean, policy = tmp_path / "rewound", tmp_path / "clean", {"snapshots": 2, "snapshot_interval": 1}
    config = config_for(rewound, layout, dtype, stability__policy=policy, run__save_interval=save_interval)
    found = run_ranks(layout.world, train_synthetic, config, BadSamples(BAD, kind))
    skipping = config_for(clean, layout, dtype, data__skip=[LEFT_OUT])
    expected = run_ranks(layout.world, train_synthetic, skipping, BadSamples(NOTHING, kind))
    assert curve(rewound) == curve(clean) and same(found, expected)
    (event,) = events(rewound, "rewind")
    assert event["to_step"] == 3 and "went back to the copy in memory of step 3" in event["reason"]
    saved = [each["step"] for each in events(rewound, "save") if not each.get("undone")]
    assert saved == ([2, 4, 6, 8] if save_interval else [3, 8])  # where there was none to start from after a crash, one is made


def test_a_crash_right_after_the_rewind_forgets_nothing(tmp_path: Path) -> None:
    crashed, clean, layout = tmp_path / "crashed", tmp_path / "clean", Layout(1)
    # Saved after every step: the checkpoint of the first bad one must be gone as well, or the resumed run would start from it.
    with pytest.raises(RankFailed):
        run_ranks(1, train_synthetic, config_for(crashed, layout, run__save_interval=1), BadSamples(BAD, "huge", dies_after_rewind=True))
    assert (crashed / "checkpoints" / "latest").read_text() == "step00000003" and not list(crashed.glob("checkpoints/step00000004*"))
    resumed = run_ranks(1, train_synthetic, config_for(crashed, layout), BadSamples(BAD, "huge"))
    clean_config = config_for(clean, layout, data__skip=[[50, 59], [36, 45], [40, 55]])  # in any order, overlapping
    expected = run_ranks(1, train_synthetic, clean_config, BadSamples(NOTHING, "huge"))
    assert curve(crashed) == curve(clean) and same(resumed, expected)
    assert [event["step"] for event in events(crashed, "rewind")] == [5]
    again = run_ranks(1, train_synthetic, config_for(crashed, layout, run__total_steps=STEPS), BadSamples(BAD, "huge"))
    assert same(again, expected) and len(json.loads((crashed / "skips.json").read_text())["rewinds"]) == 1


def test_a_checkpoint_takes_the_list_into_another_folder(tmp_path: Path) -> None:
    first, second, clean, layout = tmp_path / "first", tmp_path / "second", tmp_path / "clean", Layout(1)
    fault = BadSamples(BAD, "huge", dies_after_rewind=True, saves_before=True)
    with pytest.raises(RankFailed):
        run_ranks(1, train_synthetic, config_for(first, layout, run__save_interval=1), fault)
    origin = str(first / "checkpoints" / "step00000003")
    run_ranks(1, train_synthetic, config_for(second, layout, run__resume=origin), BadSamples(BAD, "huge"))
    run_ranks(1, train_synthetic, config_for(clean, layout, data__skip=[LEFT_OUT]), BadSamples(NOTHING, "huge"))
    assert curve(second) == curve(clean)[3:] and events(second, "rewind") == []


def test_before_its_first_checkpoint_a_run_goes_back_to_the_one_it_began_from(tmp_path: Path) -> None:
    first, second, clean, layout = tmp_path / "first", tmp_path / "second", tmp_path / "clean", Layout(2, zero=1)
    run_ranks(2, train_synthetic, config_for(first, layout), BadSamples(NOTHING, "huge"))
    kept = {path: path.stat().st_mtime_ns for path in [first, *sorted(first.rglob("*"))]}
    origin = first / "checkpoints" / "step00000002"  # of four: those after it are another run's and stay
    config = config_for(second, layout, run__resume=str(origin), run__save_interval=None)
    found = run_ranks(2, train_synthetic, config, BadSamples(BAD, "huge"))
    expected = run_ranks(2, train_synthetic, config_for(clean, layout, data__skip=[LEFT_OUT]), BadSamples(NOTHING, "huge"))
    assert curve(second) == curve(clean)[2:] and same(found, expected)
    (event,) = events(second, "rewind")
    assert (event["step"], event["to_step"], event["samples"]) == (5, 2, LEFT_OUT) and f"went back to {origin}," in event["reason"]
    assert [each["step"] for each in events(second, "save")] == [2, 8]  # what a crash after going back would start from; the last
    assert {path: path.stat().st_mtime_ns for path in [first, *sorted(first.rglob("*"))]} == kept


def test_events_name_the_samples_of_a_step_with_gaps(tmp_path: Path) -> None:
    policy = {"rewind_after": None}
    config = config_for(tmp_path, Layout(1), data__skip=[[50, 51], [26, 28], [40, 41]], stability__policy=policy)
    run_ranks(1, train_synthetic, config, BadSamples(range(42, 56), "huge"))
    told = {event["step"]: event for event in events(tmp_path, "loss_spike")}
    assert (told[4]["samples"], told[4]["left_out"]) == ([39, 54], [[40, 41], [50, 51]])
    assert told[5]["samples"] == [55, 66] and "left_out" not in told[5]


def test_a_run_that_gets_no_further_ends(tmp_path: Path) -> None:
    config = config_for(tmp_path, Layout(1), stability__policy={"max_rewinds": 2})
    with pytest.raises(RankFailed, match="TrainingEnded: training stopped: .* after 2 rewinds without a step beyond the furthest"):
        run_ranks(1, train_synthetic, config, BadSamples(range(40, 1000), "huge"))
    assert [(event["step"], event["samples"]) for event in events(tmp_path, "rewind")] == [(5, [36, 59]), (5, [60, 83])]


def test_without_a_checkpoint_the_run_says_so_once_and_goes_on(tmp_path: Path) -> None:
    config = config_for(tmp_path, Layout(2), run__save_interval=None)
    run_ranks(2, train_synthetic, config, BadSamples(range(40, 95), "nan"))  # asked for at steps 5 and 7
    (told,) = events(tmp_path, "warning")
    assert told["step"] == 5 and "no checkpoint before them" in told["reason"] and events(tmp_path, "rewind") == []
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1)) and not (tmp_path / "skips.json").exists()
