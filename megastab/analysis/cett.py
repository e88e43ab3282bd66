"""Cumulative tail error (CETT, arXiv 2411.02335): how much of an MLP's output its weak neurons carry, at every threshold exactly.

Neuron i adds n_i(x) = a_i(x) * W_down[:, i] to the output, of length |a_i| * ||W_down[:, i]||. With the neurons D = {i: ||n_i|| < eps}
left out, the error of a token is ||sum over D of n_i|| / ||sum over all of n_i||, and CETT its mean over tokens. A bias of the down
projection is no neuron's and counts in neither sum; a token whose output is 0 has no error and is left out.

Letters: N tokens, F neurons, D width of the output.

Differs: the released code tries 65,536 evenly spaced thresholds and steps one to the left of the one found, which wraps around to the
largest where that is the first. Here every neuron of every token is one step of a sorted curve: no grid, no search, no wrap.

A curve is computed once and then answers for any target; it needs no assumption that CETT rises with eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = {"cpu": 1 << 20}  # of [n, F, D]: what a cache holds
CHUNK_ELEMENTS_ELSEWHERE = 1 << 24
BLOCK = 32  # neurons summed by one small product: running sums by themselves are bound by memory, three times slower


class TailCurve(NamedTuple):
    """CETT and sparsity of one layer at every threshold that makes a difference, thresholds rising."""

    thresholds: Tensor
    """[M] eps; the last is larger than every neuron's output."""
    sparsity: Tensor
    """[M] share of neurons left out at it."""
    cett: Tensor
    """[M] the largest CETT up to it: CETT itself may fall where neurons cancel one another."""

    def at(self, target: float) -> tuple[float, float]:
        """(eps, sparsity) of the largest threshold up to which CETT never exceeds ``target``."""
        last = int(torch.searchsorted(self.cett, self.cett.new_tensor(target), right=True)) - 1
        return float(self.thresholds[max(last, 0)]), float(self.sparsity[max(last, 0)])

    def thinned(self, levels: int = 1 << 16) -> TailCurve:
        """At most ``levels`` + 1 points: those that answer for CETT 0, 1 / levels, 2 / levels, ... exactly; for other targets the answer
        is that of the level below."""
        wanted = torch.arange(levels + 1, dtype=torch.float64, device=self.cett.device) / levels
        last = torch.searchsorted(self.cett.double(), wanted, right=True) - 1
        kept = last.clamp(min=0).unique()
        return TailCurve(self.thresholds[kept], self.sparsity[kept], self.cett[kept])


def neuron_lengths(down_DF: Tensor) -> Tensor:
    """[F] ||W_down[:, i]||."""
    return torch.linalg.vector_norm(down_DF.to(torch.promote_types(down_DF.dtype, torch.float32)), dim=0)


def tail_curve(activations_NF: Tensor, down_DF: Tensor, progress: Callable[[int], object] = lambda tokens: None) -> TailCurve:
    """The curve of one layer.

    Args:
        activations_NF: what enters the down projection.
        down_DF: the down projection, [out, in].
        progress: called with the number of tokens done since the last call.

    Memory: about 40 bytes per activation at its peak, 12 kept, and the sums of a chunk of tokens. Time: one pass over N * F * D numbers.
    """
    wide = torch.promote_types(activations_NF.dtype, torch.float32)
    down_FD, lengths_F = down_DF.to(wide).t().contiguous(), neuron_lengths(down_DF)
    sizes, steps = [], []
    limit = CHUNK_ELEMENTS.get(down_FD.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    for chunk_nF in activations_NF.split(max(1, limit // down_FD.numel())):
        size_nF, order_nF = (chunk_nF.to(wide).abs() * lengths_F).sort(dim=1)
        tail_nF = _running_lengths(chunk_nF.to(wide).gather(1, order_nF), order_nF, down_FD)
        has_output_n = tail_nF[:, -1] > 0
        error_nF = (tail_nF / tail_nF[:, -1:])[has_output_n].double()
        sizes.append(size_nF)
        steps.append(torch.zeros_like(size_nF, dtype=torch.float64))
        steps[-1][has_output_n] = error_nF.diff(dim=1, prepend=torch.zeros_like(error_nF[:, :1]))
        progress(len(chunk_nF))
    return _merged(torch.cat(sizes).flatten(), torch.cat(steps))


def _running_lengths(activations_nF: Tensor, order_nF: Tensor, down_FD: Tensor) -> Tensor:
    """[n, F] ||sum of the first k + 1 neurons' outputs|| in the order given, ``activations_nF`` in that order already.

    Letters: b neurons of a block, k blocks. Within a block the sums are one product with a triangle; neurons of 0 fill the first block.
    """
    (tokens, neurons), width = order_nF.shape, down_FD.shape[1]
    missing = -neurons % BLOCK
    activations_nF, order_nF = F.pad(activations_nF, (missing, 0)), F.pad(order_nF, (missing, 0))
    columns_nkbD = down_FD.index_select(0, order_nF.flatten()).view(tokens, -1, BLOCK, width)
    triangle_bb = torch.ones(BLOCK, BLOCK, dtype=down_FD.dtype, device=down_FD.device).tril()
    sums_nkbD = (triangle_bb * activations_nF.view(tokens, -1, 1, BLOCK)) @ columns_nkbD
    before_nkD = sums_nkbD[:, :-1, -1].cumsum(1)
    sums_nkbD[:, 1:] += before_nkD[:, :, None]
    return torch.linalg.vector_norm(sums_nkbD, dim=-1).flatten(1)[:, missing:]


def _merged(size_M: Tensor, step_NF: Tensor) -> TailCurve:
    """All tokens' steps in the order of their thresholds; neurons of equal length go together."""
    counted = int((step_NF != 0).any(1).sum())
    size_M, order_M = size_M.sort()
    cett_M = step_NF.flatten()[order_M].cumsum(0) / max(counted, 1)
    left_out_M = torch.arange(len(size_M) + 1, dtype=torch.float64, device=size_M.device)
    above = torch.nextafter(size_M[-1:], size_M.new_full((1,), torch.inf))
    thresholds, cett = torch.cat([size_M, above]), torch.cat([cett_M.new_zeros(1), cett_M]).clamp_(min=0)
    is_cut = torch.cat([size_M.new_ones(1, dtype=torch.bool), thresholds.diff() > 0])
    return TailCurve(thresholds[is_cut], (left_out_M / len(size_M))[is_cut].float(), cett[is_cut].cummax(0).values.float())


def largest_within(holds: Callable[[float], bool], tried: Iterable[float], tolerance: float) -> float:
    """The largest number of [0, 1] at which ``holds`` is true, if it is true below some number and false above; 0 is taken to hold.

    Args:
        holds: asked once at each number.
        tried: numbers to ask first, rising; the first that fails ends them.
        tolerance: how far below the true one the answer may lie.
    """
    low, high = 0.0, 1.0
    for value in tried:
        if not holds(value):
            high = value
            break
        low = value
    else:
        if holds(1.0):
            return 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
