"""An export with its own modelling file, for what no architecture of Hugging Face has: our names, our orientation, our model section."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from megastab.checkpoint.hf_names import Home
from megastab.checkpoint.weight_source import VOCABULARY
from megastab.config.schema import Megastab, ModelConfig
from megastab.model.transformer import Transformer
from megastab.parallel.param_info import info_of

KIND = "megastab"
CODE = "modeling_megastab.py"
_CLASSES = {"AutoConfig": "MegastabConfig", "AutoModelForCausalLM": "MegastabForCausalLM"}


def own_homes(model: ModelConfig) -> dict[str, Home]:
    """Every matrix as a tensor of its own; vocabulary padding excluded."""
    with torch.device("meta"):
        module = Transformer(Megastab(model=model))
    homes = {}
    for parameter in module.parameters():
        info = info_of(parameter)
        assert info is not None, "every parameter of a megastab model is described"
        for part in info.parts:
            rows = model.vocab_size or 0 if part.name in VOCABULARY else part.rows
            homes[part.name] = Home(f"weights.{part.name.replace('.', '__')}", rows, info.width)
    return homes


def own_config(model: ModelConfig, homes: dict[str, Home], dtype: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` the modelling file reads; no cache, because it has none."""
    shapes = {name: [home.rows] if home.width is None else [home.rows, home.width] for name, home in homes.items()}
    return {
        "architectures": [_CLASSES["AutoModelForCausalLM"]],
        "model_type": KIND,
        "auto_map": {auto: f"{Path(CODE).stem}.{name}" for auto, name in _CLASSES.items()},
        "torch_dtype": dtype,
        "use_cache": False,
        **tokens,
        "megastab": model.model_dump(mode="json"),
        "shapes": shapes,
    }


def write_code(folder: Path) -> None:
    """Put the modelling file beside the weights."""
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)


def load_own(folder: Path) -> Any:
    """The exported model by the file just written, past transformers' cache of other people's code."""
    spec = importlib.util.spec_from_file_location("exported_modeling_megastab", folder / CODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MegastabForCausalLM.from_pretrained(folder)
