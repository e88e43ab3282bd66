"""Run folders written as the trainer writes them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megastab.stability.record import Event, StepRecord
from megastab.stability.zclip import ZClip
from megastab.telemetry.sinks import RunFolder

RunMaker = Callable[..., Path]
CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.json"


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {"loss": 8.0 / step, "lr": 1e-3, "grad_norm": 1.5, "clip_threshold": 1.0, "clip_scale": 1.0}
    values |= {"z": None, "action": "apply", "reason": "", "rescaled": 0, "tokens": 1000, "seconds": 0.5}
    return StepRecord(step=step, **{**values, **changes})


@pytest.fixture
def run(tmp_path: Path) -> RunMaker:
    """A run folder: ``run({step: changes}, {step: validation loss}, events)``."""

    def make(
        changes: Mapping[int, dict[str, Any]] | None = None,
        valid: Mapping[int, float] | None = None,
        events: tuple[Event, ...] = (),
        num_steps: int = 40,
        name: str = "run",
    ) -> Path:
        folder = RunFolder(tmp_path / name, is_writer=True)
        for step in range(1, num_steps + 1):
            folder.step(record(step, **(changes or {}).get(step, {})), {"tokens_per_second": 2000.0})
            if valid and step in valid:
                folder.evaluation(step, {"valid_loss": valid[step]})
        for event in events:
            folder.event(event)
        return folder.path

    return make


@pytest.fixture(scope="session")
def spiky_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 steps under a real ZClip: a spike that hurts the loss at 300, one that does not at 420, inf at 450, and rescales."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "spiky", is_writer=True)
    config = json.loads(CONFIG.read_text()) | {"gradient_clipping": 0.0}
    config["megastab"]["stability"] = {"zclip": {"alpha": 0.97, "z_thresh": 2.5}, "tvr": {"target_std": 0.01}}
    folder.write_config(config)
    rule, draw, hurt = ZClip(), random.Random(1), 0.0
    for step in range(1, 601):
        hurt *= 0.9
        loss = 2.0 + 6.0 * math.exp(-step / 80) + 0.02 * draw.gauss(0, 1) + hurt
        norm = {300: 9.0, 420: 4.0, 450: math.inf}.get(step, (0.8 + 2.0 * math.exp(-step / 40)) * math.exp(0.06 * draw.gauss(0, 1)))
        hurt += 1.5 if step == 300 else 0.0
        made = rule.observe(norm)
        taken = record(
            step, loss=loss, grad_norm=norm, clip_threshold=made.threshold, clip_scale=made.scale, z=made.z, action=made.action,
            reason=made.reason, tokens=4096, lr=2e-3 * min(1.0, step / 50),
        )  # fmt: skip
        kept = {} if rule.mean is None else {"clip_mean": rule.mean, "clip_std": rule.var**0.5, "clip_rate": rule.spike_rate}
        folder.step(taken, {"tokens_per_second": 8192.0, "model_tflops": 0.02, "data_seconds": 0.001, "memory_gb": 0.6, **kept})
        if made.action != "apply":
            share = None if math.isinf(norm) else 0.81
            top = [{"name": f"layers.{i}.q", "share": share if i == 3 else 0.05 / (i + 1)} for i in (3, 0, 1, 2, 4)]
            facts = {"loss": loss, "norm": norm, "z": made.z, "threshold": made.threshold, "scale": made.scale, "top": top}
            folder.event(Event(step, made.action, made.reason, {**facts, "samples": [8 * (step - 1), 8 * step - 1]}))
        if step == 301:
            folder.event(Event(step, "loss_spike", "the loss is 31 deviations above its median", {"loss": loss, "z": 31.0}))
        if step % 100 == 0:
            folder.evaluation(step, {"valid_loss": loss + 0.1, "valid_bits_per_byte": (loss + 0.1) / 3})
            folder.event(Event(step, "save", f"checkpoints/step{step}"))
        if step % 50 == 0 and step >= 200:
            for layer in range(step // 200):
                facts = {"name": f"layers.{layer}.up", "std": 0.01 + 0.002 * (layer + 1), "target": 0.01, "mean": 0.0}
                folder.event(Event(step, "rescale", f"layers.{layer}.up: over its target", facts))
    folder.event(Event(452, "warning", "the loss scale <is> at its floor & stays"))
    return folder.path
