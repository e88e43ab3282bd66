"""The parallel layers: matrices cut over tensor-parallel ranks, always along dim 0, the residual dimension stored last.

Letters: T tokens on this rank's residual stream (a 1/tp share under sequence parallel), G all tokens of the micro-batch (G = T
without it), D residual width, O this rank's outputs, I this rank's inputs, V this rank's vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megastab.parallel import collectives
from megastab.parallel.grid import TensorParallel
from megastab.parallel.param_info import ParamInfo, Part, describe


class _ColumnProduct(torch.autograd.Function):
    """``gather(x) @ weight.T + bias``; the input gradient travels while the weight gradient is computed."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.has_bias = tp, bias_O is not None
        ctx.save_for_backward(x_TD, weight_OD)  # the shard, not the gathered copy: memory over one more gather
        x_GD = collectives.gather_rows(x_TD, tp.group)[0] if tp.sequence else x_TD
        return F.linear(x_GD, weight_OD, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_OD = ctx.saved_tensors
        tp, dy_GO = ctx.tp, grads[0].contiguous()
        x_GD, gathering = collectives.gather_rows(x_TD, tp.group, async_op=True) if tp.sequence else (x_TD, None)
        dx_GD = dy_GO @ weight_OD
        if tp.sequence:
            dx_TD, sending = collectives.scatter_rows_sum(dx_GD, tp.group, async_op=True)
        else:
            dx_TD, sending = dx_GD, collectives.sum_(dx_GD, tp.group, async_op=True)
        collectives.wait(gathering)
        dweight_OD = dy_GO.t() @ x_GD
        dbias_O = dy_GO.sum(0) if ctx.has_bias else None
        collectives.wait(sending)
        return dx_TD, dweight_OD, dbias_O, None


class _RowProduct(torch.autograd.Function):
    """``reduce(x @ weight)``: every rank's term summed, and under sequence parallel scattered by token."""

    @staticmethod
    def forward(ctx: Any, x_GI: Tensor, weight_ID: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x_GI, weight_ID)
        return _reduce_tokens(x_GI @ weight_ID, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_GI, weight_ID = ctx.saved_tensors
        dy_GD = collectives.gather_rows(grads[0], ctx.tp.group)[0] if ctx.tp.sequence else grads[0]
        return dy_GD @ weight_ID.t(), x_GI.t() @ dy_GD, None


class _ReduceTokens(torch.autograd.Function):
    """Sum over tp ranks (scattered by token under sequence parallel); backward copies (or gathers)."""

    @staticmethod
    def forward(ctx: Any, x_GD: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _reduce_tokens(x_GD.clone(), tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (collectives.gather_rows(grads[0], ctx.tp.group)[0] if ctx.tp.sequence else grads[0]), None


def _reduce_tokens(x_GD: Tensor, tp: TensorParallel) -> Tensor:
    if tp.sequence:
        return collectives.scatter_rows_sum(x_GD, tp.group)[0]
    collectives.sum_(x_GD, tp.group)
    return x_GD


@torch.compiler.disable
def _parallel(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Run a product that communicates. Dynamo breaks its graph here: compiled pieces lie between collectives."""
    return function.apply(*args)


def column_product(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, tp: TensorParallel) -> Tensor:
    """[T, D] tokens times rank-local output rows -> [G, O]."""
    return F.linear(x_TD, weight_OD, bias_O) if tp.size == 1 else _parallel(_ColumnProduct, x_TD, weight_OD, bias_O, tp)


def row_product(x_GI: Tensor, weight_ID: Tensor, tp: TensorParallel) -> Tensor:
    """[G, I] rank-local inputs times their rows -> [T, D], summed over tp."""
    return x_GI @ weight_ID if tp.size == 1 else _parallel(_RowProduct, x_GI, weight_ID, tp)


def sharded(parts: tuple[Part, ...], width: int | None, tp: TensorParallel, layer: int | None, copies: int = 1) -> nn.Parameter:
    """An uninitialised parameter of ``parts`` cut over ``tp``; [rows, width], or [rows] for a vector.

    Ranks that hold copies of the same rows each compute a term of their gradient, hence ``grad_group``.
    """
    rows = sum(part.rows for part in parts)
    parameter = nn.Parameter(torch.empty(rows) if width is None else torch.empty(rows, width))
    group = tp.copies_group(copies)
    info = ParamInfo(parts, layer, width, tp.rank % copies == 0, is_sharded=tp.size > 1, grad_group=group)
    return describe(parameter, info)


def replicated(part: Part, width: int | None, tp: TensorParallel, layer: int | None, sees_token_share: bool = True) -> nn.Parameter:
    """An uninitialised parameter every tp rank holds whole. Under sequence parallel it sees a share of the tokens, so that each
    rank's gradient is one term of the sum."""
    parameter = nn.Parameter(torch.empty(part.rows) if width is None else torch.empty(part.rows, width))
    group = tp.group if tp.sequence and sees_token_share else None
    return describe(parameter, ParamInfo((part,), layer, width, tp.rank == 0, grad_group=group))


def shared_by_heads(part: Part, tp: TensorParallel, layer: int) -> nn.Parameter:
    """An uninitialised vector every tp rank holds whole and applies to its own heads, so that each rank's gradient is one term of the
    sum, whether or not it sees all tokens."""
    return describe(nn.Parameter(torch.empty(part.rows)), ParamInfo((part,), layer, None, tp.rank == 0, grad_group=tp.group))


class ColumnParallelLinear(nn.Module):
    """``[T, D] -> [G, O]``: rows of one or several fused matrices, cut over tp by output."""

    def __init__(self, parts: tuple[Part, ...], width: int, tp: TensorParallel, layer: int, bias: bool = False, copies: int = 1):
        super().__init__()
        self.tp = tp
        self.weight = sharded(parts, width, tp, layer, copies)
        biases = tuple(Part(f"{p.name}.bias", "bias", p.global_rows, p.start, p.rows) for p in parts)
        self.bias = sharded(biases, None, tp, layer, copies) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [G, O]."""
        return column_product(x_TD, self.weight, self.bias, self.tp)


class RowParallelLinear(nn.Module):
    """``[G, I] -> [T, D]``: one matrix stored [in, D], cut over tp by input; the bias is added once, after the sum."""

    def __init__(self, part: Part, width: int, tp: TensorParallel, layer: int, bias: bool = False):
        super().__init__()
        self.tp = tp
        self.weight = sharded((part,), width, tp, layer)
        self.bias = replicated(Part.whole(f"{part.name}.bias", "bias", width), None, tp, layer) if bias else None

    def forward(self, x_GI: Tensor) -> Tensor:
        """[G, I] -> [T, D]."""
        y_TD = row_product(x_GI, self.weight, self.tp)
        return y_TD if self.bias is None else y_TD + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token ids -> [T, D]; each rank looks up the vocabulary rows it holds and the results are summed."""

    def __init__(self, name: str, vocab_rows: int, width: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.part = Part.cut(name, "embedding", vocab_rows, tp)
        self.weight = sharded((self.part,), width, tp, None)

    def forward(self, ids_G: Tensor) -> Tensor:
        """[G] int64 -> [T, D]."""
        if self.tp.size == 1:
            return F.embedding(ids_G, self.weight)
        local_G = ids_G - self.part.start
        is_here_G = (local_G >= 0) & (local_G < self.part.rows)
        x_GD = F.embedding(local_G.where(is_here_G, 0), self.weight) * is_here_G[:, None]
        return _parallel(_ReduceTokens, x_GD, self.tp)
