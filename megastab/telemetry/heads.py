"""What is kept of each head's attention, from a number of its queries, so that no S x S is ever made.

What is meant (x: logits q.k / sqrt(H) after the soft-cap, if there is one; everything from fp32, whatever the dtype):

* The visible keys of a query end with its own. They begin with the sample, or with the query's document where documents are masked: the
  first key is the first of these.
* The distribution is over the visible keys and, where there is one, the sink, which is no key. Its entropy is in nats.
* A query's largest weight is on the first key if that key's logit is above those of all its other keys; a tie is none. A query that sees
  one key only, as each sample's first, is left out of this share and counts elsewhere.

Letters: Q sampled queries, C of them in one chunk, L keys, N query heads, K key/value heads (N a multiple of K), H head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUERIES = 64
CHUNK_ELEMENTS = 1 << 22  # logits in flight


class Head(NamedTuple):
    """One head's attention over the sampled queries; means are over them. NaN where there is no such number."""

    largest_logit: float
    entropy: float
    first_key_mass: float
    first_key_uniform: float
    """The mass there if every logit, the sink's too, were 0: what to hold ``first_key_mass`` against."""
    first_key_share: float
    """Share of queries whose largest weight is on the first key."""
    sink_mass: float
    """NaN without a sink."""


FIELDS = len(Head._fields)


def query_positions(seq: int) -> Tensor:
    """[Q] the positions looked at: all of a short sequence, else the middles of ``QUERIES`` equal stretches."""
    count = min(seq, QUERIES)
    return (torch.arange(count) * 2 + 1) * seq // (2 * count)


def first_keys(document_ids_S: Tensor) -> Tensor:
    """[S] where the document of each position begins."""
    begins_S = torch.ones_like(document_ids_S, dtype=torch.bool)
    begins_S[1:] = document_ids_S[1:] != document_ids_S[:-1]
    positions_S = torch.arange(len(document_ids_S), device=document_ids_S.device)
    return torch.where(begins_S, positions_S, 0).cummax(0).values


@torch.no_grad()
def heads_seen(
    q_QNH: Tensor, k_LKH: Tensor, first_Q: Tensor, last_Q: Tensor, sink_NQ: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """[N, FIELDS] fp64, in the order of :class:`Head`.

    Args:
        q_QNH: queries as the kernel gets them.
        k_LKH: keys likewise.
        first_Q: the first key each query sees.
        last_Q: the last one, ascending; on the CPU, so that nothing waits for it.
        sink_NQ: logit of the sink, fp32; None without one.
        cap: c of keys' logits capped as c tanh(x / c).
    """
    rows = max(1, CHUNK_ELEMENTS // (q_QNH.shape[1] * len(k_LKH)))
    keys_KLH, last_here_Q, found = k_LKH.detach().float().transpose(0, 1), last_Q.to(q_QNH.device), []
    for begin in range(0, len(q_QNH), rows):
        now = slice(begin, begin + rows)
        stop = int(last_Q[now][-1]) + 1  # later keys are hidden from all of these
        logits_NCL = _logits(q_QNH[now].detach().float(), keys_KLH[:, :stop], cap)
        found.append(_rows(logits_NCL, first_Q[now], last_here_Q[now], None if sink_NQ is None else sink_NQ[:, now]))
    largest, entropy, mass, uniform, is_first, sink = torch.cat(found, dim=2).double()  # [N, Q] each
    counts_Q = last_here_Q > first_Q
    share_N = (is_first * counts_Q).sum(1) / counts_Q.sum()
    return torch.stack([largest.amax(1), entropy.mean(1), mass.mean(1), uniform.mean(1), share_N, sink.mean(1)], dim=1)


def _logits(q_CNH: Tensor, keys_KLH: Tensor, cap: float | None) -> Tensor:
    """[N, C, L] of all keys, seen or not."""
    queries = q_CNH.unflatten(1, (len(keys_KLH), -1)).permute(1, 2, 0, 3)  # [K, N / K, C, H]
    logits = (queries.flatten(1, 2) @ keys_KLH.mT).mul_(q_CNH.shape[-1] ** -0.5)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    return logits.unflatten(1, queries.shape[1:3]).flatten(0, 1)


def _rows(logits_NCL: Tensor, first_C: Tensor, last_C: Tensor, sink_NC: Tensor | None) -> Tensor:
    """[FIELDS, N, C], query by query."""
    keys_L = torch.arange(logits_NCL.shape[2], device=logits_NCL.device)
    is_hidden_CL = (keys_L < first_C[:, None]) | (keys_L > last_C[:, None])
    logits_NCL = logits_NCL.masked_fill(is_hidden_CL, -torch.inf)
    total_NC = logits_NCL.logsumexp(2)
    uniform_C = 1.0 / (last_C - first_C + (1 if sink_NC is None else 2))
    sink_mass_NC, sink_entropy_NC = torch.full_like(total_NC, math.nan), torch.zeros_like(total_NC)
    if sink_NC is not None:
        total_NC = torch.logaddexp(total_NC, sink_NC)
        sink_mass_NC = (sink_NC - total_NC).exp()
        sink_entropy_NC = torch.special.entr(sink_mass_NC)
    place_NC1 = first_C[None, :, None].expand(len(logits_NCL), -1, 1)
    first_NC = logits_NCL.gather(2, place_NC1).squeeze(2)
    entropy_NC = torch.special.entr((logits_NCL - total_NC[..., None]).exp_()).sum(2) + sink_entropy_NC
    others_NC = logits_NCL.scatter(2, place_NC1, -torch.inf).amax(2)
    is_first_NC = torch.where(total_NC.isfinite(), (first_NC > others_NC).to(total_NC.dtype), torch.nan)
    mass_NC, uniform_NC = (first_NC - total_NC).exp(), uniform_C.expand_as(total_NC)
    return torch.stack([torch.maximum(first_NC, others_NC), entropy_NC, mass_NC, uniform_NC, is_first_NC, sink_mass_NC])


def layer_scalars(heads: Sequence[Head]) -> dict[str, float]:
    """A layer's heads as a few numbers; NaN where there is no such number."""
    of = {key: [getattr(head, key) for head in heads] for key in Head._fields}
    return {
        "largest_logit": _largest(of["largest_logit"]),
        "entropy": _mean(of["entropy"]),
        "entropy_min": -_largest([-value for value in of["entropy"]]),
        "first_key_mass": _mean(of["first_key_mass"]),
        "first_key_mass_max": _largest(of["first_key_mass"]),
        "first_key_share": _mean(of["first_key_share"]),
        "sink_mass": _mean(of["sink_mass"]),
    }


def layer_facts(layer: int, heads: Sequence[Head]) -> dict[str, Any]:
    """A layer as a row of ``telemetry.jsonl``: a list over its heads for each number, None for what JSON cannot say."""
    columns = {key: [_plain(getattr(head, key)) for head in heads] for key in Head._fields}
    uniform = columns.pop("first_key_uniform")[0]  # one for all heads
    if all(math.isnan(head.sink_mass) for head in heads):
        del columns["sink_mass"]
    return {"layer": layer, **columns, "first_key_uniform": uniform}


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
