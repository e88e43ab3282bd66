"""A single-process model of ours, and the copy of a Hugging Face model's weights into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megastab.checkpoint.hf_names import homes_of
from megastab.config.load import load_config
from megastab.config.schema import ModelConfig
from megastab.model.transformer import Transformer
from megastab.parallel.param_info import info_of


def build(model: dict[str, Any], **block: Any) -> Transformer:
    """Our network on one process, weights not yet drawn."""
    config = load_config(
        {
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "megastab": {"model": model, "run": {"total_steps": 1}, **block},
        },
        world_size=1,
    )
    return Transformer(config.megastab).train()


def logical(module: nn.Module, of: str = "data") -> dict[str, Tensor]:
    """Views of every logical matrix (or of its gradient, ``of="grad"``) by canonical name."""
    out: dict[str, Tensor] = {}
    for parameter in module.parameters():
        info = info_of(parameter)
        assert info is not None
        pieces = getattr(parameter, of).split([part.rows for part in info.parts])
        out.update(zip((part.name for part in info.parts), pieces, strict=True))
    return out


def names_in(model: ModelConfig, kind: str) -> dict[str, tuple[str, bool]]:
    """Our name -> (Hugging Face's, whether it is stored transposed), where each of our matrices is a whole tensor there."""
    return {name: (home.tensor, home.is_turned) for name, home in homes_of(model, kind).items()}


def matrices_in(theirs: dict[str, Tensor], model: ModelConfig, kind: str) -> dict[str, Tensor]:
    """A Hugging Face state (or its gradients) under our names, as views."""
    turned = {name: theirs[home.tensor].t() if home.is_turned else theirs[home.tensor] for name, home in homes_of(model, kind).items()}
    return {name: turned[name][home.first : home.first + home.rows] for name, home in homes_of(model, kind).items()}


@torch.no_grad()
def copy_into(module: nn.Module, matrices: dict[str, Tensor]) -> None:
    """Fill our model; every matrix of ours must be given. Padding rows of the vocabulary become noise: nothing may depend on them."""
    for name, target in logical(module).items():
        source = matrices[name]
        target[: len(source)].copy_(source)
        target[len(source) :].normal_()
