"""What the library form refuses, and what it makes of a JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import megastab
from megastab.config.errors import UserError
from megastab.config.library import load_block, load_library_config
from megastab.wrappers.adapter import UnsupportedEngine

GOOD = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"megastab": {"model": {"arch": "llama"}}}, r"megastab\.model is read by the trainer"),
        ({"megastab": {"run": {}, "stability": {}}}, r"megastab\.run is read by the trainer"),
        ({"megastab": {"stabilty": {}}}, r"megastab\.stabilty is not a known key\. Did you mean megastab\.stability\?"),
        ({"megastab": {"stability": {"zclip": {"z_tresh": 3}}}}, r"megastab\.stability\.zclip\.z_tresh .*z_thresh\?"),
        ({"megastab": {"stability": {"zclip": {"max_grad_norm": 1.0}}}}, "Its home is the top-level gradient_clipping"),
        ({"megastab": 3}, "megastab = 3 must be a section"),
        ({"megastab": {"telemetry": {"activations": True}}}, r"megastab\.telemetry\.activations = true needs the trainer's models"),
        ({"megastab": {"telemetry": {"attention": True}}}, r"megastab\.telemetry\.attention = true needs the trainer's models"),
        ({"megastab": {"telemetry": {"weights": False}}}, r"megastab\.telemetry\.weights = false leaves nothing to look at"),
        ({"megastab": {"telemetry": {"interval_steps": 0}}}, r"megastab\.telemetry\.interval_steps"),
        ({"gradient_cliping": 1.0}, r"gradient_cliping is not a key DeepSpeed 0\.19\.8 reads\. Did you mean gradient_clipping\?"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients = true is refused"),
        ({"compile": {"enabled": True}}, "compile is refused: .*torch.compile"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is refused: .*pass an mpu"),
        ({"optimizer": None}, "there is no optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "beta": 1}}}, r"optimizer\.params\.beta is not a parameter"),
    ],
)
def test_wrong_json_is_refused_before_anything_is_built(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        megastab.initialize(model=nn.Linear(2, 2), config={**GOOD, **changes})


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_library_config({**GOOD, "gradient_cliping": 1.0, "megastab": {"data": {}, "stability": {"tvr": {"target": 1}}}}, False)
    assert all(name in str(error.value) for name in ("gradient_cliping", "megastab.data", "megastab.stability.tvr.target"))


@pytest.mark.parametrize("config", [None, "both"])
def test_exactly_one_config_is_taken(config: Any) -> None:
    kwargs: dict[str, Any] = {"config": GOOD, "config_params": GOOD} if config else {}
    with pytest.raises(UserError, match="takes one config"):
        megastab.initialize(model=nn.Linear(2, 2), **kwargs)


def test_json_is_completed_as_for_the_trainer(tmp_path: Path) -> None:
    given = {**GOOD, "bf16": {"enabled": True}, "scheduler": {"type": "WarmupLR"}, "megastab": {"stability": {"zclip": {}}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    loaded = load_library_config(path, False)
    assert loaded.deepspeed["zero_optimization"]["stage"] == 1 and "megastab" not in loaded.deepspeed
    assert loaded.deepspeed["gradient_clipping"] == 0.0 and loaded.deepspeed["scheduler"] == {"type": "WarmupLR"}
    assert {"zero_optimization.stage", "gradient_clipping"} <= {completion.key for completion in loaded.completions}
    assert loaded.optimizer == ("AdamW", {"lr": 1e-3}) and loaded.stability.zclip is not None
    assert load_library_config({**GOOD, "optimizer": {"type": "Lamb"}}, False).optimizer is None, "DeepSpeed's to judge"
    assert load_library_config({"train_batch_size": 1}, True).optimizer is None
    assert loaded.block.telemetry is None, "no looks where nobody asked"
    asked = {"telemetry": {"interval_steps": 5, "attention": False}}
    assert load_library_config({**GOOD, "megastab": asked}, False).block.telemetry.interval_steps == 5  # type: ignore[union-attr]


def fake_engine(config: dict[str, Any] | None = None) -> Any:
    optimizer = type("FP16_UnfusedOptimizer", (), {})()
    return SimpleNamespace(
        optimizer=optimizer, module=nn.Linear(2, 2), gradient_clipping=lambda: 1.0, config=config, data_parallel_group=None
    )


def test_unknown_wrapper_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedEngine, match="does not drive DeepSpeed's FP16_UnfusedOptimizer"):
        megastab.attach(fake_engine())


def test_attach_refuses_what_would_break_it() -> None:
    with pytest.raises(UserError, match='no "megastab" section'):
        megastab.attach(fake_engine(), {"stability": {}})
    with pytest.raises(UserError, match="round_robin_gradients = true of the engine is refused"):
        megastab.attach(fake_engine({"zero_optimization": {"round_robin_gradients": True}}), {"megastab": {"stability": {}}})
    with pytest.raises(UserError, match="read by the trainer"):
        megastab.attach(fake_engine({"megastab": {"model": {}}}))
    assert load_block({}, {}, must_have=False).stability.zclip is None
