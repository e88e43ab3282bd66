"""megastab: stable pre-training of GPT and LLaMA models on DeepSpeed and megatron-core.

Importing this package imports neither torch nor DeepSpeed: the public names are loaded when first touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "OrthoAdam": "megastab.optim.ortho_adam",
    "StepRecord": "megastab.stability.record",
    "TVR": "megastab.stability.tvr",
    "ZClip": "megastab.stability.zclip",
    "attach": "megastab.engine.library",
    "initialize": "megastab.engine.library",
    "load_config": "megastab.config.load",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'megastab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
