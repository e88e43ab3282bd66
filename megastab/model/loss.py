"""Next-token cross-entropy over a vocabulary cut across tp ranks.

``sum_t w_t (lse_t - logit_t[label_t] + z lse_t^2)``, of logits or of soft-capped ones, ``c tanh(logit / c)``. The logits are kept once,
in the dtype the head made them; fp32 exists a chunk of tokens at a time. Nothing of vocabulary width crosses ranks: each rank's
log-sum-exp and target logit do (one all-gather of [2, T]). Padding columns never enter, so their gradient is exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megastab.parallel import collectives
from megastab.parallel.grid import ALONE, TensorParallel

# fp32 elements in flight: a chunk should stay in a CPU's cache, and be large enough to fill an accelerator.
CHUNK_ELEMENTS = {"cpu": 1 << 19}
CHUNK_ELEMENTS_ACCELERATOR = 1 << 25


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """``cap tanh(logits / cap)``, at least fp32 (Gemma 2, arXiv 2408.00118, sec. 2)."""
    return (_wide(logits) / cap).tanh_().mul_(cap)


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(_wide_dtype(logits))


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return _wide(logits) if cap is None else soft_cap(logits, cap)


def _chunks(logits_TV: Tensor) -> list[slice]:
    tokens, columns = logits_TV.shape
    rows = max(1, CHUNK_ELEMENTS.get(logits_TV.device.type, CHUNK_ELEMENTS_ACCELERATOR) // max(1, columns))
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _local_statistics(logits_TV: Tensor, local_T: Tensor, is_here_T: Tensor, cap: float | None) -> Tensor:
    """[2, T], fp32 at least: log-sum-exp over this rank's columns (-inf if it has none), and the target's logit (0 elsewhere)."""
    out = torch.zeros(2, logits_TV.shape[0], dtype=_wide_dtype(logits_TV), device=logits_TV.device)
    if logits_TV.shape[1] == 0:
        out[0] = -torch.inf
        return out
    for rows in _chunks(logits_TV):
        torch.logsumexp(_capped(logits_TV[rows], cap), dim=-1, out=out[0, rows])
    torch.where(is_here_T, _capped(logits_TV.gather(1, local_T[:, None])[:, 0], cap), out[1], out=out[1])
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        start: int,
        z_loss: float,
        tp: TensorParallel,
        cap: float | None,
    ) -> Tensor:
        local_T = labels_T - start
        is_here_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
        local_T = local_T.where(is_here_T, 0)
        mine = _local_statistics(logits_TV, local_T, is_here_T, cap)
        everyone = collectives.gather_rows(mine, tp.group)[0].view(tp.size, 2, -1)  # (tp, statistic, token)
        lse_T, target_T = everyone[:, 0].logsumexp(0), everyone[:, 1].sum(0)
        ctx.z_loss, ctx.cap = z_loss, cap
        ctx.save_for_backward(logits_TV, local_T, is_here_T, weights_T, lse_T)
        return (weights_T * (lse_T - target_T + z_loss * lse_T.square())).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, local_T, is_here_T, weights_T, lse_T = ctx.saved_tensors
        weights_T = weights_T * grads[0]
        slope_T = weights_T * (1 + 2 * ctx.z_loss * lse_T)
        targets_T = torch.where(is_here_T, -weights_T, 0.0)
        dlogits_TV = torch.empty_like(logits_TV)
        if logits_TV.shape[1]:
            for rows in _chunks(logits_TV):
                p = logits_TV[rows].to(lse_T.dtype, copy=True)
                if ctx.cap is not None:
                    tanh = p.div_(ctx.cap).tanh_()
                    p = tanh * ctx.cap
                p.sub_(lse_T[rows, None]).exp_().mul_(slope_T[rows, None])
                p.scatter_add_(1, local_T[rows, None], targets_T[rows, None])
                if ctx.cap is not None:
                    p.addcmul_(p, tanh.square_(), value=-1)  # the cap's slope is 1 - tanh^2
                dlogits_TV[rows] = p
        return dlogits_TV, None, None, None, None, None, None


@torch.compiler.disable
def cross_entropy(
    logits_TV: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    tp: TensorParallel = ALONE,
    softcap: float | None = None,
) -> Tensor:
    """Weighted sum of the tokens' losses, fp32, equal on every tp rank.

    Args:
        logits_TV: this rank's columns of the padded vocabulary, one row a token.
        labels: int64 token ids, T of them in any shape.
        weights: fp32, the same shape; 0 masks a target. They carry the normalisation (1 / targets of the step).
        vocab_size: columns that exist before padding.
        z_loss: weight of the squared log-sum-exp.
        tp: the ranks the vocabulary is cut over.
        softcap: c of ``c tanh(logit / c)``, taken of every logit first.
    """
    start = tp.rank * logits_TV.shape[1]
    columns = min(max(vocab_size - start, 0), logits_TV.shape[1])
    weights_T = weights.reshape(-1).to(_wide_dtype(logits_TV))
    return _CrossEntropy.apply(logits_TV[:, :columns], labels.reshape(-1), weights_T, start, z_loss, tp, softcap)
