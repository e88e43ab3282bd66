"""What attention weighs, written out: for looking at a model, never for running it. Letters as in ``attention.py``; X = S queries."""

from __future__ import annotations

import torch
from torch import Tensor

from megastab.model.attention import Attention
from megastab.model.context import Context
from megastab.model.loss import soft_cap


@torch.no_grad()
def attention_maps(attention: Attention, x_TD: Tensor, context: Context) -> Tensor:
    """The weights that a forward pass on ``x_TD`` gives to its keys: [B, N, S, S] fp32, rows of queries.

    Where there is a sink, what a row lacks of 1 is on it. The whole model on one rank; no documents within a sample.
    """
    projected = attention.project(x_TD)
    if attention.gates:
        projected = (projected[0][:, : projected[0].shape[1] - attention.gates], *projected[1:])
    q_BSNH, k_BSKH, _ = attention.heads(projected, context)
    repeats = q_BSNH.shape[2] // k_BSKH.shape[2]
    q, k = q_BSNH.transpose(1, 2).float(), k_BSKH.transpose(1, 2).float().repeat_interleave(repeats, 1)
    logits = _capped(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, attention.cap)
    logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1), -torch.inf)
    sink = _sink_logits(attention, q, repeats)
    return logits.softmax(-1) if sink is None else torch.cat([sink, logits], -1).softmax(-1)[..., 1:]


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else soft_cap(logits, cap)


def _sink_logits(attention: Attention, q_BNSH: Tensor, repeats: int) -> Tensor | None:
    """[B, N, S, 1]; None without a sink."""
    like = q_BNSH.new_zeros(*q_BNSH.shape[:3], 1)
    if attention.has_softmax1:
        return like
    if attention.sink is None:
        return None
    term = attention.sink(like)
    if isinstance(term, Tensor):  # a logit of its own is not capped
        return like + term.float()[:, None, None]
    key_KH = term[0] if attention.k_norm is None else attention.k_norm(term[0][None, None])[0, 0]
    products = (q_BNSH * key_KH.float().repeat_interleave(repeats, 0)[:, None]).sum(-1, keepdim=True)
    return _capped(products * q_BNSH.shape[-1] ** -0.5, attention.cap)
