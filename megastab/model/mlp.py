"""The MLP: gated (LLaMA, ``down(act(gate x) * up x)``) or plain (GPT, ``down(act(up x))``), cut over tp by channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.config.schema import ModelConfig
from megastab.parallel import collectives
from megastab.parallel.grid import ALONE, TensorParallel
from megastab.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megastab.parallel.param_info import Part


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # GPT-2's form


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()  # Primer, arXiv 2109.08668


@torch.compiler.disable
def _largest_over_ranks(top_GK: Tensor, keep: int, tp: TensorParallel) -> Tensor:
    """[G, 1]: each token's ``keep``-th largest value over all tp ranks, from every rank's largest ones."""
    tops = collectives.gather_rows(top_GK, tp.group)[0].view(tp.size, *top_GK.shape)
    return tops.movedim(0, 1).flatten(1).topk(keep, dim=-1).values[:, -1:]


def keep_largest(x_GF: Tensor, keep: int, tp: TensorParallel = ALONE) -> Tensor:
    """Zero all but the positive ones among the ``keep`` largest entries of each token (Lazy Neuron, arXiv 2210.06313).

    The channels compared are those of all tp ranks: which neuron fires must not depend on the layout.
    """
    top_GK = x_GF.detach().topk(min(keep, x_GF.shape[-1]), dim=-1).values
    threshold_G1 = top_GK[:, -1:] if tp.size == 1 else _largest_over_ranks(top_GK, keep, tp)
    return F.relu(x_GF.where(x_GF >= threshold_G1, 0.0))


class MLP(nn.Module):
    """Two products and an activation between them."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, layer: int):
        super().__init__()
        self.is_gated = config.arch == "llama"
        name, width, channels = f"layers.{layer}.mlp", config.hidden_size, config.ffn_hidden_size
        keep = max(1, round(config.activation_topk * channels))
        table: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": _gelu_tanh,
            "silu": F.silu,
            "relu": F.relu,
            "relu2": _relu2,
            "topk": lambda x: keep_largest(x, keep, tp),
        }
        self.activation = table[config.activation]
        has_bias = not self.is_gated
        up = Part.cut(f"{name}.up", "up", channels, tp)
        parts = (Part.cut(f"{name}.gate", "gate", channels, tp), up) if self.is_gated else (up,)
        self.up = ColumnParallelLinear(parts, width, tp, layer, has_bias)
        self.down = RowParallelLinear(Part.cut(f"{name}.down", "down", channels, tp), width, tp, layer, has_bias)

    def activate(self, hidden: Tensor) -> Tensor:
        """[G, 2F] (gated) or [G, F] -> [G, F]."""
        if not self.is_gated:
            return self.activation(hidden)
        gate_GF, up_GF = hidden.chunk(2, dim=-1)
        return self.activation(gate_GF) * up_GF

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down(self.activate(self.up(x_TD)))
