"""Which parameters decay, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megastab.optim.ortho_adam import OrthoAdam
from megastab.parallel.param_info import info_of


def decays(parameter: nn.Parameter) -> bool:
    """Matrices and embeddings decay, gains and biases do not; a foreign parameter is judged by its dimensions."""
    info = info_of(parameter)
    return info.decays if info is not None else len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: one with ``weight_decay``, one without; one group alone where there is no decay at all.

    The fewer the groups the better: DeepSpeed pays collectives for each.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if weight_decay == 0.0:
        return [{"params": trainable, "weight_decay": 0.0, "name": "all"}]
    groups = [
        {"params": [p for p in trainable if decays(p)], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [p for p in trainable if not decays(p)], "weight_decay": 0.0, "name": "not decayed"},
    ]
    return [group for group in groups if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """One line: how many tensors and which roles each group holds on this rank."""
    lines = []
    for group in groups:
        infos = [info_of(p) for p in group["params"]]
        roles = sorted({part.role for info in infos if info is not None for part in info.parts})
        lines.append(f"{len(group['params'])} tensors with decay {group['weight_decay']:g} ({', '.join(roles)})")
    return "; ".join(lines)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """:func:`describe_groups`, also of an OrthoAdam that keeps one group and decays by role."""
    groups = optimizer.param_groups
    if isinstance(optimizer, OrthoAdam) and optimizer.decay_by_role:
        groups = [found for group in groups for found in decay_groups(group["params"], group["weight_decay"])]
    return describe_groups(groups)


def build_optimizer(kind: str, params: dict[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """OrthoAdam, or torch's optimizer of that name; AdamW and Adam in their fused form (DeepSpeed's would be compiled for minutes).

    Args:
        kind: ``OrthoAdam``, or a class name in ``torch.optim``.
        params: its arguments, from the JSON.
        parameters: of the module, in module order.
    """
    if kind == "OrthoAdam":
        return _ortho_adam(params, [p for p in parameters if p.requires_grad])
    groups = decay_groups(parameters, float(params.get("weight_decay", 0.0)))
    fused = {"fused": True} if kind in ("Adam", "AdamW", "SGD") else {}
    return getattr(torch.optim, kind)(groups, **params, **fused)


def _ortho_adam(params: dict[str, Any], trainable: list[nn.Parameter]) -> OrthoAdam:
    """One group where it rotates: the binding knows what decays, and ZeRO then pays one exchange a step and not one a group."""
    params = {"weight_decay": 0.0, **params}  # left out of a JSON it is none, as for the others
    if params.get("rotation") == "none":
        return OrthoAdam(decay_groups(trainable, float(params["weight_decay"])), **params)
    return OrthoAdam(trainable, **params, decay_by_role=True)
