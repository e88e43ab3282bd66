"""Post-training quantisation, simulated: weights and inputs of the blocks' matrices are rounded and multiplied in fp32.

Embedding, head and norms stay as they are. q, k and v are one matrix here, gate and up another. What activations are scaled by is
fixed beforehand on other samples, so that an outlier costs what it would in use.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from megastab.analysis.rounding import absmax, zeropoint
from megastab.parallel.layers import ColumnParallelLinear

KINDS = ("W4", "W8A8", "W4A8", "W4A4")
"""Weights of 4 bits, asymmetric by output channel; weights and inputs of 8 bits, symmetric, one scale a tensor; and weights as in W4 with
inputs of 8 and of 4 bits, one scale a tensor."""


def matrices(model: nn.Module) -> list[nn.Module]:
    """The four of every block, in the order they are used."""
    return [layer for block in model.blocks for layer in (block.attention.qkv, block.attention.o, block.mlp.up, block.mlp.down)]


@torch.no_grad()
def largest_inputs(model: nn.Module, tokens_BS: Tensor) -> list[Tensor]:
    """The largest absolute value that enters each of :func:`matrices`."""
    found: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0].abs().max())) for m in matrices(model)]
    model.logits(tokens_BS)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def rounded(model: nn.Module, kind: str, largest: list[Tensor]) -> nn.Module:
    """A copy with its matrices, and unless ``kind`` is W4 their inputs, rounded; ``largest`` from :func:`largest_inputs`."""
    result = copy.deepcopy(model)
    input_bits = int(kind.partition("A")[2] or 0)
    for matrix, limit in zip(matrices(result), largest, strict=True):
        weight = matrix.weight
        if kind.startswith("W8"):
            weight.copy_(absmax(weight, 8))
        else:
            weight.copy_(zeropoint(weight, 4, 1 if isinstance(matrix, ColumnParallelLinear) else 0))  # [out, in], or [in, out]
        if input_bits:
            matrix.register_forward_pre_hook(_rounding(input_bits, limit))
    return result


def _rounding(bits: int, limit: Tensor) -> Any:
    return lambda _module, inputs: (absmax(inputs[0], bits, limit=limit), *inputs[1:])
