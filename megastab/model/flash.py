"""Softmax with one more term in its denominator, at the speed of a flash kernel, exactly.

With LSE = log sum_j exp(x_j) and one more logit s, lse' = logaddexp(LSE, s) and out' = exp(LSE - lse') out. A flash kernel's backward is
exact when it is handed out' and lse', since P' = exp(x - lse') and D' = rowsum(dout * out') keep the form it computes. What remains are
vectors: with p_s = exp(s - lse'), ds = -sum p_s D'. Where the term has a value v' and the logit b = q.k' / sqrt(H), out' gains p_b v',
db = p_b (dout.v' - D'), dv' = sum p_b dout, dq gains db k' / sqrt(H), and dk' = sum db q / sqrt(H).

Letters and layouts as in ``kernels.py``. A query that sees no key gets 0 (or v'), never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megastab.model.kernels import Capped, Kernel, Mask, flash_for
from megastab.model.logit_watch import LargestLogits, WatchedKernel

ADDED = 8  # channels of the portable form; kernels want widths that are multiples of 8


@dataclass(frozen=True)
class Extras:
    """What keeps a call from the plain kernel besides its additional term."""

    cap: float | None = None
    """c of keys' logits capped as c tanh(logit / c)."""
    watch: LargestLogits | None = None
    """Who is told the largest logits."""

    @property
    def are_none(self) -> bool:
        """Whether the plain kernel will do."""
        return self.cap is None and self.watch is None


NO_EXTRAS = Extras()


def attend_with_logit(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit_N: Tensor | None = None, extras: Extras = NO_EXTRAS) -> Tensor:
    """Softmax over the keys and ``logit_N``, a logit a head (0 where None) that has no value and is not capped: -> [B, N, S, H]."""
    if not extras.are_none:
        return _untraced_with_logit(q, k, v, mask, logit_N, extras)
    kernel = flash_for(q, mask)
    return portable_with_logit(q, k, v, mask, logit_N) if kernel is None else _WithLogit.apply(q, k, v, logit_N, kernel, mask)


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: tuple[Tensor, Tensor], extras: Extras = NO_EXTRAS) -> Tensor:
    """Softmax over the keys and one more key that every query sees; ``bias`` is its key and value, [K, H] each: -> [B, N, S, H]."""
    if not extras.are_none:
        return _untraced_with_bias(q, k, v, mask, bias, extras)
    kernel = flash_for(q, mask)
    return portable_with_bias(q, k, v, mask, bias) if kernel is None else _WithBias.apply(q, k, v, *bias, kernel, mask)


# Not traced: a loop over chunks would become one graph as long as the sequence, and what is looked at again depends on values.
@torch.compiler.disable
def _untraced_with_logit(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit_N: Tensor | None, extras: Extras) -> Tensor:
    kernel = _kernel(q, k, mask, extras)
    return portable_with_logit(q, k, v, mask, logit_N) if kernel is None else _WithLogit.apply(q, k, v, logit_N, kernel, mask)


@torch.compiler.disable
def _untraced_with_bias(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: tuple[Tensor, Tensor], extras: Extras) -> Tensor:
    kernel = _kernel(q, k, mask, extras)
    return portable_with_bias(q, k, v, mask, bias) if kernel is None else _WithBias.apply(q, k, v, *bias, kernel, mask)


def _kernel(q: Tensor, k: Tensor, mask: Mask, extras: Extras) -> Kernel | None:
    kernel: Kernel | None = flash_for(q, mask) if extras.cap is None else Capped(extras.cap)
    if extras.watch is None:
        return kernel
    if kernel is None:
        extras.watch.see(q, k)  # the portable form keeps its log-sum-exp to itself
        return None
    return WatchedKernel(kernel, extras.watch)


class _WithLogit(torch.autograd.Function):
    """The term has no value, and one logit a head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, logit_N: Tensor | None, kernel: Kernel, mask: Mask) -> Tensor:
        out, lse, kept = kernel.forward(q, k, v, mask)
        total = torch.logaddexp(lse, lse.new_zeros(()) if logit_N is None else logit_N[:, None].to(lse.dtype))
        out.mul_((lse - total).exp_().unsqueeze(-1))
        ctx.kernel, ctx.mask = kernel, mask
        ctx.save_for_backward(q, k, v, out, total, logit_N, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, logit_N, *kept = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(grads[0], q, k, v, out, total, tuple(kept), ctx.mask)
        dlogit_N = None
        if logit_N is not None and ctx.needs_input_grad[3]:
            p_BNS = (logit_N[:, None].to(total.dtype) - total).exp_()
            dlogit_N = p_BNS.mul_(_dot(grads[0], out)).sum(dim=(0, 2)).neg_().to(logit_N.dtype)
        return dq, dk, dv, dlogit_N, None, None


class _WithBias(torch.autograd.Function):
    """The term has a key and a value for each key/value head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_KH: Tensor, value_KH: Tensor, kernel: Kernel, mask: Mask) -> Tensor:
        out, lse, kept = kernel.forward(q, k, v, mask)
        repeats = q.shape[1] // k.shape[1]
        b_BNS = _dot(q, _rows(key_KH, repeats)).mul_(q.shape[-1] ** -0.5)
        if kernel.cap is not None:
            b_BNS = b_BNS.div_(kernel.cap).tanh_().mul_(kernel.cap)
        total = torch.logaddexp(lse, b_BNS)
        kept_share, p_BNS1 = (lse - total).exp_().unsqueeze(-1), (b_BNS - total).exp_().unsqueeze(-1)
        out = torch.addcmul(out * kept_share, p_BNS1, _rows(value_KH, repeats).to(p_BNS1.dtype)).to(q.dtype)
        ctx.kernel, ctx.mask = kernel, mask
        ctx.save_for_backward(q, k, v, out, total, b_BNS, key_KH, value_KH, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, b_BNS, key_KH, value_KH, *kept = ctx.saved_tensors
        dout, kernel, repeats, scale = grads[0], ctx.kernel, q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = kernel.backward(dout, q, k, v, out, total, tuple(kept), ctx.mask)
        p_BNS = (b_BNS - total).exp_()
        db_BNS = _dot(dout, _rows(value_KH, repeats) - out).mul_(p_BNS).mul_(scale)
        if kernel.cap is not None:
            db_BNS.mul_(1.0 - (b_BNS / kernel.cap).square_())
        dq.addcmul_(db_BNS.unsqueeze(-1).to(dq.dtype), _rows(key_KH, repeats))
        return dq, dk, dv, _summed(db_BNS, q, repeats), _summed(p_BNS, dout, repeats), None, None


def _rows(x_KH: Tensor, repeats: int) -> Tensor:
    """[K, H] -> [N, 1, H]: the row of each query head."""
    return x_KH.repeat_interleave(repeats, dim=0).unsqueeze(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Products over H, summed in fp32 at least: [B, N, S]."""
    return (x * y).sum(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _summed(weights_BNS: Tensor, x: Tensor, repeats: int) -> Tensor:
    """Weighted sum of [B, N, S, H] over samples, positions and the query heads of a key/value head: [K, H]."""
    sum_NH = torch.einsum("bns,bnsh->nh", weights_BNS.to(x.dtype), x)
    return sum_NH.unflatten(0, (-1, repeats)).sum(dim=1)


def portable_with_logit(q: Tensor, k: Tensor, v: Tensor, mask: Mask, logit_N: Tensor | None = None) -> Tensor:
    """:func:`attend_with_logit` by SDPA alone: added channels of the queries carry the logit to a virtual key that is 1 there.

    In two channels, what the activations' dtype holds of the logit and the rest, so that bf16 does not round it.
    """
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    if logit_N is None:
        nothing = k.new_zeros(k.shape[1], width)
        return portable_with_bias(q, k, v, mask, (nothing, nothing))
    exact = logit_N.to(torch.promote_types(q.dtype, torch.float32)) / scale
    high = exact.to(q.dtype)
    pieces = F.pad(torch.stack([high, (exact - high).to(q.dtype)], dim=-1), (0, ADDED - 2))  # [N or 1, ADDED]
    queries = torch.cat([q, pieces[None, :, None, :].expand(*q.shape[:3], ADDED)], dim=-1)
    keys, values = (F.pad(x, (0, ADDED, 1, 0)) for x in (k, v))
    with torch.no_grad():
        keys[:, :, 0, width:] = 1.0  # a constant: what keys came from has no part in it
    return _past_a_virtual_key(queries, keys, values, mask, scale)[..., :width]


def portable_with_bias(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: tuple[Tensor, Tensor]) -> Tensor:
    """:func:`attend_with_bias` by SDPA alone: a virtual key and value before the others."""
    shape = (q.shape[0], k.shape[1], 1, k.shape[-1])
    keys, values = (torch.cat([one[None, :, None].to(x.dtype).expand(shape), x], dim=2) for one, x in zip(bias, (k, v), strict=True))
    return _past_a_virtual_key(q, keys, values, mask, q.shape[-1] ** -0.5)


def _past_a_virtual_key(q: Tensor, keys: Tensor, values: Tensor, mask: Mask, scale: float) -> Tensor:
    """SDPA where every query also sees the first key."""
    has_groups = q.shape[1] != keys.shape[1]
    if mask.is_causal:  # torch's causal mask begins at the first key, so that the queries need one more row as well
        queries = F.pad(q, (0, 0, 1, 0))
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=has_groups)[:, :, 1:]
    seen = None if mask.seen is None else F.pad(mask.seen, (1, 0), value=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale, enable_gqa=has_groups)
