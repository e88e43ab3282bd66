"""Where a trained model's attention goes: to the first token, and to the key of ``kv_bias``, by layer.

Letters: B samples, S positions, N query heads, K key/value heads, H channels of a head.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def weights(q_BSNH: Tensor, k_BSKH: Tensor, key_KH: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Causal attention of every query, written out: over keys [B, N, S, S], and over the bias [B, N, S] where there is one."""
    repeats = q_BSNH.shape[2] // k_BSKH.shape[2]
    q, k = q_BSNH.transpose(1, 2), k_BSKH.transpose(1, 2).repeat_interleave(repeats, 1)
    scale = q.shape[-1] ** -0.5
    unseen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(unseen, -torch.inf)
    if key_KH is None:
        return logits.softmax(-1), None
    bias = (q * key_KH.repeat_interleave(repeats, 0)[:, None]).sum(-1, keepdim=True) * scale
    both = torch.cat([bias, logits], -1).softmax(-1)
    return both[..., 1:], both[..., 0]


def shares(over_keys_BNSS: Tensor, over_bias_BNS: Tensor | None = None) -> dict[str, float]:
    """Of all queries but the first position's, which sees one key alone; means over samples, heads and positions.

    Returns:
        ``first``: weight on the first key; ``bias``: on the bias (0 where there is none); ``first_of_keys``: of the weight that keys get,
        what the first one gets; ``first_wins``: queries whose largest weight, that on the bias included, is on the first key.
    """
    keys = over_keys_BNSS[:, :, 1:]
    bias = torch.zeros_like(keys[..., 0]) if over_bias_BNS is None else over_bias_BNS[:, :, 1:]
    first = keys[..., 0]
    wins = (first >= keys.amax(-1)) & (first >= bias)
    return {
        "first": float(first.mean()),
        "bias": float(bias.mean()),
        "first_of_keys": float((first / keys.sum(-1)).mean()),
        "first_wins": float(wins.double().mean()),
    }


def uniform(seq: int) -> float:
    """``first`` where every query attends alike to all it sees: the mean of 1/2, 1/3, ... 1/seq."""
    return sum(1 / seen for seen in range(2, seq + 1)) / (seq - 1)


@torch.no_grad()
def shares_by_layer(model: nn.Module, tokens_BS: Tensor) -> list[dict[str, float]]:
    """:func:`shares` of every block, from the queries and keys its attention was called with (QK-normalised and rotated)."""
    from megastab.model import attention
    from megastab.model.sinks import KVBias

    plain, found = attention.attend, []

    def look(q_BSNH: Tensor, k_BSKH: Tensor, *more: Any) -> Tensor:
        layer = model.blocks[len(found)].attention
        is_biased = isinstance(layer.sink, KVBias)
        if layer.has_softmax1 or layer.cap is not None or (layer.sink is not None and (not is_biased or layer.k_norm is not None)):
            raise ValueError("only plain attention, and kv_bias without qk_norm, are written out here")
        key_KH = layer.sink(q_BSNH)[0] if is_biased else None
        found.append(shares(*weights(q_BSNH, k_BSKH, key_KH)))
        return plain(q_BSNH, k_BSKH, *more)

    with mock.patch.object(attention, "attend", look):
        model.logits(tokens_BS)
    return found
