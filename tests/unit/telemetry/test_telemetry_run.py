"""What a run leaves of its telemetry: lines, scalars, pictures, and one event where an activation becomes massive, also after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megastab.telemetry.activations import Place
from megastab.telemetry.heads import Head
from megastab.telemetry.moments import Entry, Summary
from megastab.telemetry.pictures import figure_of_heads, figure_of_sample, image_of
from megastab.telemetry.sampler import Sample
from megastab.telemetry.tags import SAMPLED
from tests.layouts import Layout, config_of
from tests.ranks import run_ranks


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(config: dict[str, Any], grows_at: int) -> None:
    """A run in which layer 1's MLP writes one huge entry from step ``grows_at`` on."""
    import torch

    from megastab.config.load import load_config
    from megastab.data.batches import Batches
    from megastab.data.training import TrainingData
    from megastab.engine.trainer import Trainer
    from megastab.parallel.grid import Grid
    from tests.layouts import SyntheticSource

    loaded = load_config(config)
    grid = Grid.create(loaded.megastab.parallel.tensor, loaded.megastab.parallel.pipeline)
    sizes = {"micro_batch": loaded.micro_batch, "accumulation": loaded.accumulation, "dp_rank": grid.dp.rank, "dp_size": grid.dp.size}
    trainer = Trainer(loaded, grid, TrainingData(Batches(SyntheticSource(), document_mask=False, **sizes)))
    for name, module in trainer.engine.module.named_modules():
        if name == "blocks.1":

            def grow(_: Any, __: Any, y_TD: torch.Tensor) -> torch.Tensor:
                if trainer.step + 1 < grows_at:
                    return y_TD
                mask = torch.zeros_like(y_TD)
                mask[19, 5] = -7000.0
                return y_TD + mask

            module.register_forward_hook(grow)
    trainer.announce()
    trainer.resume()
    trainer.train()
    trainer.engine.monitor.tb_monitor.flush()


def config_for(folder: Path, **changes: Any) -> dict[str, Any]:
    fixed = {
        "telemetry": {"interval_steps": 2},
        "run": {"dir": str(folder), "total_steps": 6, "save_interval": 3, "resume": "none"},
        "ds__tensorboard": {"enabled": True, "output_path": str(folder / "tensorboard"), "job_name": "run"},
    }
    return config_of(Layout(1), **{**fixed, **changes})


def test_a_run_tells_what_it_saw(tmp_path: Path) -> None:
    run_ranks(1, train, config_for(tmp_path / "run"), 4)
    found = lines(tmp_path / "run" / "telemetry.jsonl")
    assert [line["step"] for line in found] == [1, 2, 4, 6]
    for line in found:
        assert len(line["activations"]) == 6 and len(line["weights"]) == 16 and len(line["attention"]) == 2
        assert all(len(row["entropy"]) == 4 and 0 < min(row["first_key_mass"]) < 1 for row in line["attention"])
        massive = [row["layer"] for row in line["activations"] if row["is_massive"]]
        assert massive == ([] if line["step"] < 4 else [1])
    (event,) = [event for event in lines(tmp_path / "run" / "events.jsonl") if event["kind"] == "massive_activation"]
    assert event["step"] == 4 and event["layer"] == 1 and event["value"] == pytest.approx(-7000, rel=1e-3)
    assert (event["channel"], event["position"]) == (5, 3) and "layers.1 reaches -7" in event["reason"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(next((tmp_path / "run" / "tensorboard").rglob("events.*")).parent)).Reload()
    scalars = told.Tags()["scalars"]
    assert {tag.name for tag in SAMPLED.values()} - {"weights/std_over_target", "attention/sink_mass"} <= {
        name.split("/")[0] for name in scalars
    } | {"/".join(name.split("/")[:2]) for name in scalars}
    assert [each.step for each in told.Images("activations")] == [1, 2, 4, 6]
    assert [each.step for each in told.Images("attention_heads")] == [1, 2, 4, 6]
    of_attention = [name for name in scalars if name.startswith("attention/")]
    assert len(of_attention) == 2 * 6, "layers, and not layers times heads"
    largest_mass = {each.step: each.value for each in told.Scalars("attention/first_key_mass_max/layers.1")}
    assert largest_mass == pytest.approx({line["step"]: max(line["attention"][1]["first_key_mass"]) for line in found})
    largest = {each.step: each.value for each in told.Scalars("activation_max/residual/layers.1")}
    assert largest[2] < 100 < 6990 < largest[4] and [e.step for e in told.Scalars("weights/update_ratio/layers.0.attention.q")] == [
        1,
        2,
        4,
        6,
    ]


def test_after_a_resume_nothing_is_told_twice(tmp_path: Path) -> None:
    run_ranks(1, train, config_for(tmp_path), 2)
    run_ranks(1, train, config_for(tmp_path, run__resume="auto", run__total_steps=8), 2)
    told = [event["step"] for event in lines(tmp_path / "events.jsonl") if event["kind"] == "massive_activation"]
    assert told == [2] and [line["step"] for line in lines(tmp_path / "telemetry.jsonl")] == [1, 2, 4, 6, 8]


def test_switched_off_it_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(1, train, config_for(tmp_path, telemetry__interval_steps=None), 1)
    assert not (tmp_path / "telemetry.jsonl").exists()
    assert not [event for event in lines(tmp_path / "events.jsonl") if event["kind"] == "massive_activation"]


def test_what_is_not_finite_is_told_once_and_named() -> None:
    from types import SimpleNamespace

    from megastab.config.schema_telemetry import TelemetryConfig
    from megastab.telemetry.sampler import Sampler

    nothing = SimpleNamespace(adapter=None, grid=None)
    sampler = Sampler(TelemetryConfig(interval_steps=None), nothing, 1)  # type: ignore[arg-type]
    seen = Summary((Entry(math.inf, 3, 1, 2, 9),), math.nan, 0.5, 3.0, 3.0, 7)
    sample = Sample(5, {Place(0, "mlp"): seen})
    (event,) = sampler.events(sample)
    assert event.kind == "warning" and "layers.0 mlp: 7 activations are not finite" in event.reason and "fp32" in event.reason
    assert sampler.events(sample) == []
    assert json.loads(json.dumps(sample.to_json(), allow_nan=False))["activations"][0]["top"][0]["value"] is None


@pytest.mark.parametrize("value", [3.0, 0.0, math.inf, math.nan])
def test_any_sample_can_be_drawn(value: float) -> None:
    one = Summary((Entry(value, 0, 0, 0, 0),), value, value, value, value, 0)
    nothing = Summary((), math.nan, math.nan, math.nan, math.nan, 0)
    image = image_of(figure_of_sample(Sample(1, {Place(0, "residual"): one, Place(0, "mlp"): nothing, Place(1, "residual"): nothing})))
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype.name == "uint8" and image.std() > 0
    heads = (Head(value, value, value, value, value, value), Head(1.0, 0.5, 0.5, 0.1, 0.0, math.nan))
    image = image_of(figure_of_heads(Sample(1, attention={0: heads, 1: heads})))
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype.name == "uint8" and image.std() > 0


def test_the_picture_of_heads_has_them_in_their_places() -> None:
    layers = {layer: tuple(Head(1.0, 2.0 + head, (3 * layer + head) / 10, 0.1, 0.0, 0.0) for head in range(3)) for layer in range(2)}
    panels = [axes for axes in figure_of_heads(Sample(7, attention=layers)).axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == ["mass on the first key", "entropy, nats"]
    assert panels[0].images[0].get_array().flatten().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert panels[0].images[0].get_clim() == (0.0, 1.0) and panels[1].images[0].get_array().tolist() == [[2.0, 3.0, 4.0]] * 2
