"""The neurons of a model's MLPs: what they are while it runs, and the model with those below a threshold left out.

A neuron is one input of a block's down projection, whether the MLP is gated or not; what it adds to the output has the length
|a_i| * ||W_down[:, i]|| (``cett.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megastab.analysis.cett import neuron_lengths
from megastab.analysis.perplexity import batches
from megastab.analysis.subject import Linear, Subject
from megastab.config.errors import UserError


class Counts(NamedTuple):
    """Of one layer, over all tokens that passed."""

    neurons: int
    left_out: int
    nonzero: int
    """Activations that were not exactly 0, before any was left out."""


def down_projections(subject: Subject) -> list[Linear]:
    """One for every block.

    Raises:
        UserError: a block has none that is known by its name, or several (a mixture of experts).
    """
    linears = list(subject.linears())
    found = [linear for linear in linears if linear.role == "down"]
    if [linear.layer for linear in found] != list(range(len(subject.blocks))):
        roles = ", ".join(linear.role for linear in linears if linear.layer == 0) or "no matrices"
        raise UserError(
            f"{subject.name} has {len(found)} down projections in {len(subject.blocks)} blocks, but one each is needed; its first block "
            f"has {roles}. Mixtures of experts, and names other than down_proj, dense_4h_to_h or GPT-2's c_proj, are not supported"
        )
    return found


def down_DF(linear: Linear) -> Tensor:
    """Its matrix as [out, in]."""
    weight = linear.weight.detach()
    return weight.t() if linear.is_transposed else weight


def activations(subject: Subject, downs: Sequence[Linear], windows_CS: Tensor, batch: int, num_tokens: int) -> list[Tensor]:
    """[N, F] for every layer, on the CPU, of ``num_tokens`` tokens (or all) spread evenly over the windows."""
    total = windows_CS.numel()
    kept_N = torch.linspace(0, total - 1, min(num_tokens, total)).round().long()
    first, found = 0, [[] for _ in downs]  # type: tuple[int, list[list[Tensor]]]

    def see(layer: int, inputs_TF: Tensor) -> None:
        here = kept_N[(kept_N >= first) & (kept_N < first + len(inputs_TF))] - first
        found[layer].append(inputs_TF[here.to(inputs_TF.device)].cpu())

    with watched(downs, see):
        for window_BS in batches(windows_CS, batch, "calibration"):
            subject.run(window_BS)
            first += window_BS.numel()
    return [torch.cat(each) for each in found]


@contextmanager
def pruned(downs: Sequence[Linear], thresholds: Sequence[float]) -> Iterator[Callable[[], list[Counts]]]:
    """Inside, neurons whose output is shorter than their layer's threshold are 0; the result tells how many so far."""
    lengths = [neuron_lengths(down_DF(linear)) for linear in downs]
    sums = [torch.zeros(2, dtype=torch.int64, device=linear.weight.device) for linear in downs]
    neurons = [0] * len(downs)

    def cut(layer: int, inputs_TF: Tensor) -> Tensor:
        is_kept_TF = inputs_TF.to(lengths[layer].dtype).abs() * lengths[layer] >= thresholds[layer]
        sums[layer] += torch.stack([(~is_kept_TF).sum(), (inputs_TF != 0).sum()])
        neurons[layer] += inputs_TF.numel()
        return inputs_TF * is_kept_TF

    with watched(downs, cut):
        yield lambda: [Counts(n, *(int(x) for x in s.tolist())) for n, s in zip(neurons, sums, strict=True)]


@contextmanager
def watched(downs: Sequence[Linear], see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``see(layer, [T, F])`` with what enters each down projection; what it returns, if not None, enters instead."""

    def before(layer: int, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = see(layer, inputs[0].reshape(-1, inputs[0].shape[-1]))
        return None if new is None else (new.view_as(inputs[0]), *inputs[1:])

    handles = [linear.module.register_forward_pre_hook(partial(before, i)) for i, linear in enumerate(downs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
