"""A resumed OrthoAdam run is the run bit for bit, under every wrapper; moments of another rotation are refused."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import jobs
from tests.layouts import LLAMA, Layout, config_of
from tests.ranks import run_ranks
from tests.unit.checkpoint.test_checkpoint_resume import attempt, curve, train

HALF, WHOLE = 3, 6
MODEL = {**LLAMA, "hidden_size": 48, "ffn_hidden_size": 80, "num_kv_heads": 2}
CASES = {
    "plain": (Layout(1), "fp32"),
    "tp2-pp2": (Layout(4, tp=2, pp=2, sp=True, accumulation=2), "fp32"),
    "zero1": (Layout(3, zero=1), "fp32"),
    "zero3": (Layout(3, zero=3), "fp32"),
    "bf16": (Layout(3, zero=1), "bf16"),
    "zero2-offload": (Layout(3, zero=2, offload=True), "fp32"),
    "zero3-tp2-bf16": (Layout(4, tp=2, zero=3), "bf16"),
}


def config_for(name: str, folder: Path, params: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    layout, dtype = CASES[name]
    run = {"dir": str(folder), "total_steps": WHOLE, "save_interval": HALF, "resume": "none"}
    return config_of(layout, "OrthoAdam", dtype, **{"model": MODEL, "run": run, "ds__optimizer__params": params or {"seed": 5}, **changes})


@functools.cache
def straight(name: str) -> tuple[Path, list[dict[str, Any]]]:
    folder = Path(tempfile.mkdtemp(prefix="ortho-resume-"))
    return folder, run_ranks(CASES[name][0].world, train, config_for(name, folder))


def origin(name: str) -> str:
    return str(straight(name)[0] / "checkpoints" / f"step{HALF:08d}")


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_is_the_run_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder, before = straight(name)
    after = run_ranks(CASES[name][0].world, train, config_for(name, tmp_path, run__resume=origin(name)))
    expected, found = curve(folder), curve(tmp_path)
    assert sorted(found) == list(range(HALF + 1, WHOLE + 1)) and found == {step: expected[step] for step in found}
    for mine, theirs in zip(after, before, strict=True):
        for now, then in zip(mine["masters"], theirs["masters"], strict=True):
            assert now[:3] == then[:3] and np.array_equal(now[3], then[3]), now[0]


@pytest.mark.parametrize("name", ["tp2-pp2", "zero1"])
@pytest.mark.parametrize(
    ("params", "said"),
    [({"seed": 6}, "seed 5 there, 6 here"), ({"seed": 5, "rotation": "haar"}, "rotation hadamard there, haar here")],
    ids=["seed", "rotation"],
)
def test_moments_of_another_rotation_are_refused_once(name: str, params: dict[str, Any], said: str, tmp_path: Path) -> None:
    straight(name)
    (first, message), *others = run_ranks(CASES[name][0].world, attempt, config_for(name, tmp_path, params, run__resume=origin(name)))
    assert first == "UserError" and {kind for kind, _ in others} == {"PeerFailed"}
    assert said in message and "its moments mean nothing here" in message


def rewound(config: dict[str, Any], folder: str) -> list[list[np.ndarray]]:
    """On a rank: masters two steps after a checkpoint, and again after going back to it in the same engine."""
    job = jobs.start(config)
    job.step()
    job.built.engine.save_checkpoint(folder, tag="one")
    consumed, found = job.batches.consumed, []
    for attempt_at in range(2):
        if attempt_at:
            job.built.engine.load_checkpoint(folder, tag="one")
            job.batches.consumed = consumed
        for _ in range(2):
            job.step()
        found.append([piece[3] for piece in jobs.masters(job)])
    return found


@pytest.mark.parametrize("name", ["zero1", "zero3", "bf16"])
def test_going_back_in_the_same_engine_needs_no_second_binding(name: str, tmp_path: Path) -> None:
    for first, second in run_ranks(3, rewound, config_for(name, tmp_path / "run"), str(tmp_path / "kept")):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
