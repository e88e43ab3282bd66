"""Initial weights, a function of (seed, canonical name, element) only.

| role                                   | normal | residual_scaled     | lir (arXiv 2503.17500)   |
|----------------------------------------|--------|---------------------|--------------------------|
| embedding, position, head              | std    | std                 | std                      |
| q, k, v, gate, up of layer l (from 1)  | std    | std                 | std / sqrt(l)            |
| o, down                                | std    | std / sqrt(2 L)     | std / sqrt(l)            |
| output_gate of layer l                 | std    | std                 | std / sqrt(l)            |
| norm gains, biases, padding rows       | 1, 0, 0 under every scheme                               |
| learned sink logits                    | 0 under every scheme                                     |
| kv_bias key and value                  | 0.02 under every scheme (arXiv 2402.17762)               |
| scales (DyT's alpha, the embedding's)  | their part's ``initial`` under every scheme              |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megastab.config.schema import ModelConfig
from megastab.parallel import rng
from megastab.parallel.param_info import ParamInfo, Part, Role, info_of

# (1-D view of what this rank holds of a parameter, position of its first element in the rank-local parameter)
Held = tuple[Tensor, int]

_OUTSIDE: frozenset[Role] = frozenset({"embedding", "position", "head"})
_RESIDUAL: frozenset[Role] = frozenset({"o", "down"})
_ZERO: frozenset[Role] = frozenset({"bias", "sink"})
_KV_BIAS_STD = 0.02


def weight_std(role: Role, layer: int | None, config: ModelConfig) -> float:
    """Standard deviation of a matrix of ``role`` in 0-based ``layer``."""
    std = config.init.std
    if role == "kv_bias":
        return _KV_BIAS_STD
    if role in _OUTSIDE or layer is None:
        return std
    if config.init.scheme == "lir":
        return std / math.sqrt(layer + 1)
    if config.init.scheme == "residual_scaled" and role in _RESIDUAL:
        return std / math.sqrt(2 * config.num_layers)
    return std


def whole(parameter: nn.Parameter) -> Held:
    """What a rank holds where parameters are not partitioned: everything."""
    return parameter.data.view(-1), 0


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int, held: Callable[[nn.Parameter], Held] = whole) -> None:
    """Draw every weight this rank holds, and no other.

    Args:
        model: layers whose parameters carry a :class:`ParamInfo`.
        held: where a parameter's local elements live (ZeRO-3 holds a range of each).
    """
    for parameter in model.parameters():
        info = info_of(parameter)
        assert info is not None, "every parameter of a megastab model is described"
        _fill(info, *held(parameter), config, seed)


def _fill(info: ParamInfo, local: Tensor, first: int, config: ModelConfig, seed: int) -> None:
    width, offset = info.width or 1, 0
    for part in info.parts:
        stop = offset + part.rows * width
        low, high = max(first, offset), min(first + local.numel(), stop)
        if low < high:
            start = part.start * width + low - offset  # of this piece, in the global matrix
            _fill_part(local[low - first : high - first], part, width, start, info.layer, config, seed)
        offset = stop


def _fill_part(piece: Tensor, part: Part, width: int, start: int, layer: int | None, config: ModelConfig, seed: int) -> None:
    if part.role == "norm":
        piece.fill_(1.0)
    elif part.role in _ZERO:
        piece.zero_()
    elif part.role == "scale":
        assert part.initial is not None, f"{part.name} does not say what it starts at"
        piece.fill_(part.initial)
    else:
        rng.fill_normal_(piece, weight_std(part.role, layer, config), seed, part.name, start)
        if part.role in ("embedding", "head") and config.vocab_size is not None:
            piece[max(0, config.vocab_size * width - start) :].zero_()  # padding rows
