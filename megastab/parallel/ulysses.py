"""Attention over sequences that ranks share, in the manner of DeepSpeed-Ulysses (arXiv 2309.14509).

Everything but attention works on a rank's own positions. For attention one all-to-all turns [own positions, all heads] into [all
positions, own heads], queries, keys and values in one message, and another turns its output back. So attention itself, its sinks, caps,
document masks and what looks at it are those of one process on fewer heads: a sink is added once because each head is on one rank.

Letters: B samples, s positions of this rank, S = cp * s of the sequence, N query heads and K key/value heads of the tp rank, n = N / cp,
k = max(1, K / cp), H width of a head. With fewer key/value heads than ranks a head goes to each rank whose query heads read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.grid import Axis


class _Exchange(torch.autograd.Function):
    """Row r of dim 0 to rank r, for rows that lie as they came; the gradient travels back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: Axis) -> Tensor:
        ctx.cp = cp
        return collectives.exchange_equal(x, cp.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return collectives.exchange_equal(grads[0], ctx.cp.group), None


@torch.compiler.disable
def _exchange(x: Tensor, cp: Axis) -> Tensor:
    """Dynamo breaks its graph here: compiled pieces lie between collectives."""
    return _Exchange.apply(x, cp)


def to_heads(q_BsNH: Tensor, k_BsKH: Tensor, v_BsKH: Tensor, cp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """All heads at this rank's positions -> q [B, S, n, H], k and v [B, S, k, H]: this rank's heads at all positions."""
    if cp.size == 1:
        return q_BsNH, k_BsKH, v_BsKH
    shares = [_by_rank(x, cp) for x in (q_BsNH, k_BsKH, v_BsKH)]
    here = _exchange(torch.cat(shares, dim=3), cp)  # [cp, B, s, n + 2k, H], now by the rank that had the positions
    batch, positions, _, width = q_BsNH.shape
    runs = here.transpose(0, 1).split([share.shape[3] for share in shares], dim=3)
    q, k, v = (run.reshape(batch, cp.size * positions, -1, width) for run in runs)
    return q, k, v


def _by_rank(x_BsMH: Tensor, cp: Axis) -> Tensor:
    """-> [cp, B, s, M / cp, H]: the heads of each rank; one head goes to several where there are too few."""
    heads = x_BsMH.shape[2]
    if heads < cp.size:
        x_BsMH = x_BsMH.repeat_interleave(cp.size // heads, dim=2)
    return x_BsMH.unflatten(2, (cp.size, -1)).permute(2, 0, 1, 3, 4)


def to_positions(out_BSnH: Tensor, cp: Axis) -> Tensor:
    """This rank's heads at all positions -> [B, s, N, H], all heads at its positions."""
    if cp.size == 1:
        return out_BSnH
    here = _exchange(out_BSnH.unflatten(1, (cp.size, -1)).transpose(0, 1), cp)  # [cp, B, s, n, H], now by the rank that had the heads
    return here.permute(1, 2, 0, 3, 4).flatten(2, 3)


def own_heads(x: Tensor, cp: Axis) -> Tensor:
    """Of something with one row for each head, the rows of the heads :func:`to_heads` brings here. Its gradient is this rank's term of a
    sum over ``cp``, which the data-parallel sum takes."""
    if cp.size == 1:
        return x
    first = cp.rank * len(x) // cp.size
    return x[first : first + max(1, len(x) // cp.size)]
