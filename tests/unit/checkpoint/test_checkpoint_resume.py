"""A resumed run is the run: loss, norm, learning rate and masters bit for bit, in a fresh job.

Dropout and the document mask make each step depend on its samples, their numbers and the position in the data; warm-up and cosine
make it depend on the schedule. ``straight`` trains 2N steps and saves after N; ``resumed`` starts from there in a folder of its own.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megastab.checkpoint.weights import merged_weights
from tests import jobs
from tests.layouts import GPT, Layout, SyntheticSource, config_of
from tests.oracle.models import build, logical
from tests.ranks import run_ranks

HALF, WHOLE = 3, 6
TP2_PP2 = Layout(4, tp=2, pp=2, sp=True, zero=1, accumulation=2)
CASES = {
    "plain": (Layout(1), "fp32"),
    "plain-dp2": (Layout(2, accumulation=2), "fp32"),
    "zero1": (Layout(2, zero=1), "fp32"),
    "zero2": (Layout(2, zero=2), "fp32"),
    "zero3": (Layout(2, zero=3), "fp32"),
    "tp2": (Layout(2, tp=2, sp=True), "fp32"),
    "pp2": (Layout(2, pp=2, accumulation=2), "fp32"),
    "cp2": (Layout(2, cp=2, zero=2), "bf16"),
    "tp2-pp2": (Layout(4, tp=2, pp=2, sp=True, accumulation=2), "fp32"),
    "bf16": (Layout(2, zero=1), "bf16"),
    "tp2-pp2-bf16": (TP2_PP2, "bf16"),
    "zero2-bf16": (Layout(3, zero=2), "bf16"),
    "zero3-bf16-tp2": (Layout(4, tp=2, zero=3), "bf16"),
    "zero1-fp16": (Layout(2, zero=1), "fp16"),
    "zero3-fp16": (Layout(2, zero=3), "fp16"),
    "zero2-bf16-offload": (Layout(2, zero=2, offload=True), "bf16"),
    "zero1-bf16-offload": (Layout(2, zero=1, offload=True), "bf16"),
    "zero3-bf16-offload-params": (Layout(2, zero=3, offload=True, offload_param=True), "bf16"),
    "zero1-bf16-activations": (Layout(2, zero=1, activations="ssd"), "bf16"),
}
each_case = pytest.mark.parametrize("name", CASES)


def train(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the trainer's own story, on synthetic samples."""
    from megastab.config.load import load_config
    from megastab.data.batches import Batches
    from megastab.data.training import TrainingData
    from megastab.engine.trainer import Trainer
    from megastab.parallel.grid import Grid

    loaded = load_config(config)
    parallel = loaded.megastab.parallel
    grid = Grid.create(parallel.tensor, parallel.pipeline, parallel.sequence, loaded.megastab.model.num_kv_heads)
    batches = Batches(
        SyntheticSource(),
        micro_batch=loaded.micro_batch,
        accumulation=loaded.accumulation,
        dp_rank=grid.dp.rank,
        dp_size=grid.dp.size,
        document_mask=loaded.megastab.data.document_mask,
    )
    trainer = Trainer(loaded, grid, TrainingData(batches))
    trainer.announce()
    trainer.resume()
    trainer.train()
    job = jobs.Job(loaded, grid, trainer.built, trainer.stepper, batches)
    scaler = float(getattr(trainer.engine.optimizer, "loss_scale", 1.0))
    return {"masters": jobs.masters(job), "consumed": batches.consumed, "loss_scale": scaler}


def config_for(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    layout, dtype = CASES[name]
    fixed = {
        "model": {**GPT, "dropout": 0.1, "num_kv_heads": 2},
        "data": {"document_mask": True},
        # Statistics of the norm and the phase of rescaling are part of the curve: both act before and after the break.
        "stability": {"zclip": {"warmup_steps": 2, "z_thresh": 0.3}, "tvr": {"target_std": 0.09, "interval_steps": 2}},
        "run": {"dir": str(folder), "total_steps": WHOLE, "save_interval": HALF, "resume": "none"},
    }
    if dtype == "fp16":
        fixed["ds__fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}  # the scale grows on the way
    return config_of(layout, "AdamW", dtype, **{**fixed, **changes})


def curve(folder: Path) -> dict[int, tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"], line["clip_scale"]) for line in lines}


@functools.cache
def runs(name: str) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """The folder that holds both runs, and what every rank of each ended with."""
    folder, (layout, _) = Path(tempfile.mkdtemp(prefix="resume-")), CASES[name]
    straight = run_ranks(layout.world, train, config_for(name, folder / "straight"))
    origin = str(folder / "straight" / "checkpoints" / f"step{HALF:08d}")
    resumed = run_ranks(layout.world, train, config_for(name, folder / "resumed", run__resume=origin))
    return folder, straight, resumed


@each_case
def test_resumed_run_is_the_run_bit_for_bit(name: str) -> None:
    folder, straight, resumed = runs(name)
    expected, found = curve(folder / "straight"), curve(folder / "resumed")
    assert sorted(expected) == list(range(1, WHOLE + 1)) and sorted(found) == list(range(HALF + 1, WHOLE + 1))
    assert found == {step: expected[step] for step in found}
    assert len({values[0] for values in expected.values()}) == WHOLE, "every step differs, or nothing is tested"
    for before, after in zip(straight, resumed, strict=True):
        assert after["consumed"] == before["consumed"] and after["loss_scale"] == before["loss_scale"]
        for mine, theirs in zip(after["masters"], before["masters"], strict=True):
            assert mine[:3] == theirs[:3] and np.array_equal(mine[3], theirs[3]), mine[0]


@each_case
def test_portable_weights_merge_to_the_rounded_masters(name: str) -> None:
    folder, straight, _ = runs(name)
    masters, _ = jobs.merge(rank["masters"] for rank in straight)
    merged = dict(merged_weights(folder / "straight" / "checkpoints" / f"step{WHOLE:08d}" / "weights"))
    assert merged.keys() == masters.keys()
    for matrix, values in merged.items():
        assert torch.equal(values.reshape(-1), torch.from_numpy(masters[matrix]).to(values.dtype)), matrix


@pytest.mark.parametrize("name", ["tp2-pp2", "zero3"])
def test_portable_weights_fill_a_model_cut_otherwise(name: str) -> None:
    from megastab.checkpoint.weights import load_weights

    folder, straight, _ = runs(name)
    model = build({**GPT, "dropout": 0.1, "num_kv_heads": 2})
    load_weights(model, folder / "straight" / "checkpoints" / f"step{WHOLE:08d}" / "weights")
    masters, _ = jobs.merge(rank["masters"] for rank in straight)
    for matrix, values in logical(model).items():
        assert np.array_equal(values.reshape(-1).detach().numpy(), masters[matrix]), matrix


def attempt(config: dict[str, Any]) -> tuple[str, str]:
    """On a rank: how resuming fails."""
    from megastab.config.errors import UserError
    from megastab.parallel.collectives import PeerFailed

    try:
        train(config)
    except (UserError, PeerFailed) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {**GPT, "num_layers": 3}}, ("another model", "num_layers 2 there, 3 here", "resume=none")),
        ({"run": {"resume": "/no/such/folder"}}, ("no checkpoint there",)),
    ],
    ids=["model", "missing"],
)
def test_checkpoint_that_does_not_fit_is_refused_once_and_everywhere(
    changes: dict[str, Any], said: tuple[str, ...], tmp_path: Path
) -> None:
    folder, _, _ = runs("zero3")
    config = config_for("zero3", tmp_path, run__resume=str(folder / "straight" / "checkpoints"))
    for section, values in changes.items():
        config["megastab"][section] = {**config["megastab"][section], **values}
    (first, message), (second, _) = run_ranks(2, attempt, config)
    assert (first, second) == ("UserError", "PeerFailed"), "told by one rank; the other leaves quietly"
    assert all(words in message for words in said), message


def test_run_goes_on_in_another_shape_and_says_so(tmp_path: Path) -> None:
    """1e-5: only the order of sums differs (2e-6 over eight steps)."""
    folder, straight, _ = runs("zero3")
    origin = folder / "straight" / "checkpoints" / f"step{HALF:08d}"
    (found,) = run_ranks(1, train, config_for("plain", tmp_path, run__resume=str(origin)))
    expected, curve_found = curve(folder / "straight"), curve(tmp_path)
    assert sorted(curve_found) == list(range(HALF + 1, WHOLE + 1)) and found["consumed"] == straight[0]["consumed"]
    for step, values in curve_found.items():
        assert values == pytest.approx(expected[step], rel=1e-5)
    (told,) = (line for line in map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines()) if line["kind"] == "resume")
    assert told["reason"] == f"from {origin} in another shape: world 2 -> 1, data 2 -> 1, zero_stage 3 -> 0"


def test_auto_takes_the_newest_and_none_starts_anew(tmp_path: Path) -> None:
    config = config_for("plain", tmp_path / "run", run__total_steps=2, run__save_interval=None)
    (first,) = run_ranks(1, train, config)
    config["megastab"]["run"] |= {"resume": "auto", "total_steps": 4}
    (second,) = run_ranks(1, train, config)
    assert sorted(curve(tmp_path / "run")) == [1, 2, 3, 4] and second["consumed"] == 2 * first["consumed"]
    config["megastab"]["run"] |= {"resume": "none", "total_steps": 2}
    (third,) = run_ranks(1, train, config)
    assert third["consumed"] == first["consumed"] and sorted(curve(tmp_path / "run")) == [1, 2]
    assert all(np.array_equal(mine[3], theirs[3]) for mine, theirs in zip(third["masters"], first["masters"], strict=True))
