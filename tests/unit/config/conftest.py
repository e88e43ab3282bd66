"""A small complete config, and a loader that changes it by overrides, as a user would."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import pytest

from megastab.config.config import Config
from megastab.config.errors import UserError
from megastab.config.load import load_config

BASE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "megastab": {
        "model": {
            "arch": "llama",
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 8,
            "num_kv_heads": 4,
            "ffn_hidden_size": 192,
            "max_seq_len": 32,
            "vocab_size": 1000,
        },
        "run": {"dir": "runs/small", "total_steps": 100},
    },
}


class Load(Protocol):
    def __call__(self, *overrides: str, world: int = 1) -> Config: ...


class Refuse(Protocol):
    def __call__(self, *overrides: str, world: int = 1) -> str: ...


@pytest.fixture(autouse=True)
def cpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def base() -> dict[str, Any]:
    return copy.deepcopy(BASE)


@pytest.fixture
def load() -> Load:
    def load_changed(*overrides: str, world: int = 1) -> Config:
        return load_config(BASE, overrides, world_size=world)

    return load_changed


@pytest.fixture
def refuse() -> Refuse:
    """The message a config is refused with."""

    def message(*overrides: str, world: int = 1) -> str:
        with pytest.raises(UserError) as caught:
            load_config(BASE, overrides, world_size=world)
        return str(caught.value)

    return message
